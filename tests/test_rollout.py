"""rollout="merged" against TRL's own road on every architecture: the same candidates, log-probabilities,
loss and gradients; parts of an update and two views of a study."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from rollouts import shared_rollout
from transformers import set_seed

from valor.policy.adapter import adapted_layers, adapted_weight
from valor.policy.models import load_policy
from valor.testing import KINDS, miniature_policy
from valor.train.rollout import merged, stays_beside

FILMS = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (70, 60 + 20 * i), dtype=np.uint8))
    for i in range(3)
]  # of different widths: Qwen counts different numbers of image tokens


def studies(two=False):
    columns = dict(image=FILMS, report=["the heart is enlarged"] * 3) | (
        dict(second_image=[FILMS[1], None, FILMS[0]], second_view=[1, 0, 1]) if two else {}
    )
    features = dict(image=ImageColumn(), report=Value("string")) | (
        dict(second_image=ImageColumn(), second_view=Value("int64")) if two else {}
    )
    return Dataset.from_dict(columns, features=Features(features))


def trainer(folder, out, share, two=False, prepare=None, **changes):
    set_seed(0)
    model, processor = load_policy(folder)
    if prepare:
        prepare(model)
    own = dict(per_device_train_batch_size=9, logging_strategy="no", learning_rate=1e-3)
    t = shared_rollout(model, processor, studies(two), out, share, 4, **own | changes)
    for i, (name, p) in enumerate(t.model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(i))
    return t


def step(t):
    rows = [dict(t.train_dataset[i]) for i in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    t.model.train()
    set_seed(1)
    batch = t._generate_and_score_completions(rows)
    t.current_gradient_accumulation_steps = 1
    loss = t._compute_loss(t.model, batch)
    return (
        batch,
        loss,
        torch.autograd.grad(loss, [p for p in t.model.parameters() if p.requires_grad], allow_unused=True),
    )


@pytest.mark.parametrize("kind,two", [*((k, False) for k in KINDS), ("llava", True), ("qwen2_5_vl", True)])
def test_merged_equals_trl(kind, two, tmp_path):
    folder = miniature_policy(kind, tmp_path / "policy")
    theirs, ours = (step(trainer(folder, tmp_path / str(share), share, two)) for share in (False, True))
    assert (
        torch.equal(theirs[0]["completion_ids"], ours[0]["completion_ids"])
        and theirs[0]["completion_ids"].unique().numel() > 5
    )
    forbidden = trainer(folder, tmp_path / "t", True).model.generation_config.suppress_tokens
    assert forbidden and not set(forbidden) & set(ours[0]["completion_ids"].flatten().tolist())
    assert torch.allclose(theirs[0]["ref_per_token_logps"], ours[0]["ref_per_token_logps"], atol=1e-5)
    assert torch.allclose(theirs[1], ours[1], atol=1e-5)
    pairs = [(a, b) for a, b in zip(theirs[2], ours[2]) if a is not None]
    assert (
        all(torch.allclose(a, b, atol=1e-5, rtol=1e-3) for a, b in pairs)
        and max(a.abs().max() for a, _ in pairs) > 1e-4
    )


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_parts_of_an_update_are_equal(kind, tmp_path):
    "One update of nine candidates: whole, in three parts of a group each, and candidate by candidate."
    folder, ends = miniature_policy(kind, tmp_path / "policy"), []
    for parts in (1, 3, 9):
        t = trainer(
            folder,
            tmp_path / str(parts),
            True,
            per_device_train_batch_size=9 // parts,
            gradient_accumulation_steps=parts,
            max_steps=1,
        )
        set_seed(2)
        t.train()
        ends.append([p.detach().clone() for n, p in t.model.named_parameters() if "lora" in n])
    before = [
        p for n, p in trainer(folder, tmp_path / "before", True).model.named_parameters() if "lora" in n
    ]
    assert (
        max((a - b).abs().max() for end in ends[1:] for a, b in zip(ends[0], end))
        < 1e-4
        < max((a - b).abs().max() for a, b in zip(ends[0], before))
    )


def test_parts_that_cut_through_groups_are_equal(tmp_path):
    "Parts of two candidates, one of each prompt's: rows then count as prompts of their own."
    t = trainer(miniature_policy("llava", tmp_path / "policy"), tmp_path / "t", True)
    batch, _, _ = step(t)
    apart = torch.cat([score(t, batch, rows) for rows in ([0, 3], [1, 4, 6], [2, 5, 7, 8])])
    whole = score(t, batch, [0, 3, 1, 4, 6, 2, 5, 7, 8])
    in_order = score(t, batch, list(range(9)))[[0, 3, 1, 4, 6, 2, 5, 7, 8]]
    assert torch.allclose(apart, in_order, atol=1e-5) and torch.allclose(whole, in_order, atol=1e-5)


@torch.no_grad()
def score(t, batch, rows):
    "Log-probabilities of the candidates `rows` of `batch`, 0 behind their ends."
    mask = batch["completion_mask"][rows]
    return t._score(t.model, batch["completion_ids"][rows], mask, batch["pixel_values"][rows, 0])[0] * mask


class Coarse(torch.nn.Linear):
    "A layer whose weights are held in 8 bits and a scale."

    @classmethod
    def of(cls, layer):
        held = cls(layer.in_features, layer.out_features, layer.bias is not None)
        held.scale, held.bias = layer.weight.abs().max().item() / 127, layer.bias
        coarse = (layer.weight.data / held.scale).round().to(torch.int8)
        held.weight = torch.nn.Parameter(coarse, requires_grad=False)
        return held

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantised(model):
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and "language_model" in name:
            model.set_submodule(name, Coarse.of(layer))


def test_quantised_weights_keep_their_adapter_beside_them(tmp_path, capsys):
    folder, steps = miniature_policy("llava", tmp_path / "policy"), []
    for share in (False, True):
        t = trainer(folder, tmp_path / str(share), share, prepare=quantised)
        held = [adapted_weight(layer).clone() for layer in adapted_layers(t.model).values()]
        steps.append(step(t))
        assert all(torch.equal(a, adapted_weight(b)) for a, b in zip(held, adapted_layers(t.model).values()))
    assert stays_beside(t.model) and "the adapter stays beside" in capsys.readouterr().out
    with merged(t.model, {}) as policy:
        assert len(adapted_layers(policy)) == len(held)
    theirs, ours = steps
    assert torch.equal(theirs[0]["completion_ids"], ours[0]["completion_ids"])
    assert torch.allclose(theirs[1], ours[1], atol=1e-5)
    for a, b in zip(theirs[2], ours[2]):
        assert a is None or torch.allclose(a, b, atol=1e-5, rtol=1e-3)
