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

from valor.policy.models import load_policy
from valor.testing import KINDS, miniature_policy

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


def trainer(folder, out, share, two=False, **changes):
    set_seed(0)
    model, processor = load_policy(folder)
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
def test_parts_of_an_update_are_shuffled_and_still_equal(kind, tmp_path):
    "One update of nine candidates, whole and in three parts of three, which hold candidates of any prompt."
    folder, ends = miniature_policy(kind, tmp_path / "policy"), []
    for parts in (1, 3):
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
        max((a - b).abs().max() for a, b in zip(ends[0], ends[1]))
        < 1e-4
        < max((a - b).abs().max() for a, b in zip(ends[0], before))
    )


def test_quantised_weights_are_refused(tmp_path):
    t = trainer(miniature_policy("llava", tmp_path / "policy"), tmp_path / "t", True)
    layer = next(m for m in t.model.modules() if hasattr(m, "lora_A"))
    layer.get_base_layer().weight = torch.nn.Parameter(
        layer.get_base_layer().weight.data.to(torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="rollout='merged': the weights of .* are quantised"):
        step(t)
