"""What is sampled, scored and evaluated is one policy: in bfloat16 an adapter of early updates is in all
of them, the log says how far apart they are, and nothing of a checkpoint's own sampling reaches them."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from peft import get_peft_model
from PIL import Image
from rollouts import shared_rollout
from transformers import set_seed
from trl import GRPOTrainer

from valor.data.images import square
from valor.policy.adapter import KEPT, adapted_layers, adapted_weight, kept_share, merged_share
from valor.policy.generate import merge, with_adapter, write_reports
from valor.policy.models import (
    film_side,
    load_policy,
    load_processor,
    lora_config,
    save_policy,
)
from valor.policy.prompt import conversations
from valor.policy.server import complete
from valor.policy.tiny import generate
from valor.testing import KINDS, miniature_policy
from valor.train.rollout import merged
from valor.train.sft import sft

FILMS = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (60, 60), dtype=np.uint8)) for i in range(3)
]


def moved(model, k, lr=1e-6):
    "Give the adapter of `model` the size that it has after `k` updates at `lr`."
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            with torch.no_grad():
                p.copy_(k * lr * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).sign())
    return model


def adapted(folder, dtype, k=20):
    model, processor = load_policy(folder, dtype)
    set_seed(0)
    return moved(get_peft_model(model, lora_config(model, "language+projector", 8, 16)), k), processor


def delta(layer):
    return (
        layer.scaling["default"]
        * layer.lora_B["default"].weight.float()
        @ layer.lora_A["default"].weight.float()
    )


def carried(layer, before, wanted):
    """How much of the change `wanted` a layer, as it stands in what samples, adds to the outputs of the
    weights `before`; over so many random inputs that bfloat16's rounding averages out."""
    x = torch.randn(4096, before.shape[1], generator=torch.Generator().manual_seed(1)).to(before.dtype)
    with torch.no_grad():
        return kept_share(
            torch.nn.functional.linear(x, before),
            layer(x) - (0 if layer.bias is None else layer.bias),
            x.float() @ wanted.T,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_merged_samples_carries_the_adapter(dtype, tmp_path):
    model, _ = adapted(miniature_policy("llava", tmp_path / "base", width=128), dtype)
    before = {n: (adapted_weight(l).clone(), delta(l)) for n, l in adapted_layers(model).items()}
    assert (merged_share(model) < 0.5) == (dtype == torch.bfloat16)
    with merged(model, {}) as policy:
        inside = {n.removeprefix("base_model.model."): w for n, w in before.items()}
        layers = {n: policy.get_submodule(n) for n in inside}
        linear = {n: l for n, l in layers.items() if "layers.1" in n and "language" in n}
        got = [carried(_with_bias(linear[n]), *inside[n]) for n in linear]
    assert len(got) == 7 and np.mean(got) > KEPT - 0.03 and min(got) > 0.9, got
    assert all(torch.equal(adapted_weight(l), before[n][0]) for n, l in adapted_layers(model).items())


def _with_bias(layer):
    "The layer as a function with the attribute `bias`, an adapter's or a plain one."
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer

    def call(x):
        return layer(x)

    call.bias = base.bias
    return call


def test_evaluation_carries_the_adapter_and_merge_says_what_it_writes(tmp_path, capsys):
    base = miniature_policy("llava", tmp_path / "base", width=64)
    model, processor = adapted(base, torch.bfloat16)
    model.save_pretrained(tmp_path / "adapter")
    evaluated = with_adapter(load_policy(base, torch.bfloat16)[0], tmp_path / "adapter")
    assert "beside the bfloat16 weights" in capsys.readouterr().out and adapted_layers(evaluated)
    assert generate(evaluated, processor, FILMS, 8)
    assert not adapted_layers(with_adapter(load_policy(base, torch.float32)[0], tmp_path / "adapter"))
    with pytest.raises(
        ValueError, match=r"dtype=bfloat16: bfloat16 weights would keep 0\.\d\d of the adapter .*float32"
    ):
        merge(base, tmp_path / "adapter", tmp_path / "low", "bfloat16")
    assert not (tmp_path / "low").exists()
    assert (
        merge(base, tmp_path / "adapter", tmp_path / "whole")
        == "written in float32, which keeps 1.000 of the adapter"
    )
    assert load_policy(tmp_path / "whole", "auto")[0].dtype == torch.float32


def trainer(folder, out, dtype, share, k=0, **changes):
    set_seed(0)
    model, processor = load_policy(folder, dtype)
    data = Dataset.from_dict(
        dict(image=FILMS, report=["the heart is enlarged"] * 3),
        features=Features(image=ImageColumn(), report=Value("string")),
    )
    own = dict(per_device_train_batch_size=6, temperature=0.8, logging_steps=1, learning_rate=1e-6)
    t = shared_rollout(model, processor, data, out, share, 8, **own | changes)
    moved(t.model, k)
    return t


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gap_is_logged_and_small(kind, share, dtype, tmp_path, capsys):
    t = trainer(miniature_policy(kind, tmp_path / "policy"), tmp_path / "t", dtype, share, 20)
    t.train()
    gaps = [l["policy/gap"] for l in t.state.log_history if "policy/gap" in l]
    assert len(gaps) == 2 and max(gaps) < (1e-4 if dtype == torch.float32 else 0.05), gaps
    assert t._noise is not None and "alarm" not in capsys.readouterr().out, (gaps, t._noise)
    if share:
        assert all(l["policy/kept"] > KEPT for l in t.state.log_history if "policy/kept" in l)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_updates_of_the_optimizer_reach_what_is_sampled(mixed, checkpointing, tmp_path, capsys):
    """Real updates, in bfloat16 weights and in float32 weights that compute in bfloat16: the matrices
    that the next rollout samples with hold the adapter as it is then."""
    t = trainer(
        miniature_policy("llava", tmp_path / "policy"),
        tmp_path / "t",
        torch.float32 if mixed else torch.bfloat16,
        True,
        max_steps=3,
        bf16=mixed,
        gradient_checkpointing=checkpointing,
    )
    t.train()
    with (
        merged(t.model, {}, torch.bfloat16) as policy,
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        policy(input_ids=torch.tensor([[5, 6, 7]]))
        layers = {n: l for n, l in adapted_layers(policy).items() if "language" in n}
        got = [
            kept_share(
                0 * delta(l),
                l.wide[:, l.get_base_layer().in_features :].float()
                @ l.lora_A["default"].weight.bfloat16().float(),
                delta(l),
            )
            for l in layers.values()
        ]
    assert len(got) == 14 and min(got) > KEPT and max(got) < 2 - KEPT, got
    assert (
        max(l["policy/gap"] for l in t.state.log_history if "policy/gap" in l) < 0.05
        and "stays beside" in capsys.readouterr().out
    )


def test_another_policy_than_the_scored_one_raises_the_alarm(tmp_path, capsys, monkeypatch):
    "The rollout is made to sample without its adapter, a large one: the gap shows it."
    t = trainer(miniature_policy("llava", tmp_path / "policy"), tmp_path / "t", torch.float32, True, 20_000)
    sample = t._generate_single_turn

    def without(*args, **kw):
        with t.model.disable_adapter():
            return sample(*args, **kw)

    # the layers stay, so that they can be turned off
    monkeypatch.setattr("valor.train.rollout.stays_beside", lambda *args: True)
    t._generate_single_turn = without
    t.train()
    assert max(l.get("policy/gap", 0) for l in t.state.log_history) > 0.01
    assert capsys.readouterr().out.count("alarm at update 1: policy/gap is") == 1


def test_vllm_gap_comes_from_its_log_probabilities_and_weights_are_put_back(tmp_path, capsys, monkeypatch):
    """TRL's own road to vLLM on a stub that does what TRL does: adds the adapter to bfloat16 weights and
    takes it off again."""
    t = trainer(
        miniature_policy("llava", tmp_path / "policy"), tmp_path / "t", torch.bfloat16, False, 20, max_steps=1
    )
    before = {n: adapted_weight(l).clone() for n, l in adapted_layers(t.model).items()}
    theirs = GRPOTrainer._generate_single_turn

    def stub(self, *args, **kw):
        self.use_vllm = False
        tokens, _ = theirs(self, *args, **kw)
        self.use_vllm = True
        for layer in adapted_layers(self.model).values():
            layer.get_base_layer().weight.data.add_(0.001)
        return tokens, [[-3.0] * len(row) for row in tokens]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", stub)
    make = t._generate_single_turn

    def by_vllm(*args, **kw):
        t.use_vllm, t.vllm_mode = True, "colocate"
        try:
            return make(*args, **kw)
        finally:
            t.use_vllm = False

    t._generate_single_turn = by_vllm
    t.train()
    said, log = capsys.readouterr().out, t.state.log_history[0]
    assert (
        log["policy/gap"] > 0.1
        and log["policy/kept"] < 0.5
        and "TRL adds the adapter to the weights that it sends to vLLM" in said
        and "alarm at update 1" in said
    )
    assert all(torch.equal(adapted_weight(l), before[n]) for n, l in adapted_layers(t.model).items())


SAMPLING = dict(
    repetition_penalty=1.9,
    top_p=0.01,
    top_k=1,
    min_p=0.9,
    no_repeat_ngram_size=1,
    temperature=0.1,
    num_beams=2,
    bad_words_ids=[[5]],
    min_new_tokens=3,
    length_penalty=2.0,
    typical_p=0.1,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoints_own_sampling_reaches_nothing(kind, tmp_path):
    plain = miniature_policy(kind, tmp_path / "plain")
    odd = miniature_policy(kind, tmp_path / "odd")
    path = odd / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SAMPLING))

    def written(folder):
        model, processor = load_policy(folder)
        turn = [dict(role="user", content=[dict(type="image"), dict(type="text", text="?")])]
        t = trainer(folder, tmp_path / "t", torch.float32, False)
        rolled = t._generate_and_score_completions([dict(t.train_dataset[i]) for i in (0, 0, 0, 1, 1, 1)])[
            "completion_ids"
        ].tolist()
        save_policy(
            model, processor, tmp_path / "saved"
        )  # transformers refuses to save a top_p without do_sample
        return [
            generate(model, processor, FILMS, 9),
            generate(model, processor, FILMS * 2, 9, temperature=1.0),
            complete(model, processor, turn, FILMS[:1], 9)[0],
            complete(model, processor, turn, FILMS[:1], 9, 0.7)[0],
            rolled,
            model.generation_config.eos_token_id,
        ]

    one, two = written(plain), written(odd)
    assert one == two and len(set(one[1])) > 3
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert not {n for n in SAMPLING if kept.get(n) is not None}, kept


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_films_are_shown_at_the_size_of_training(kind, tmp_path, monkeypatch):
    base = miniature_policy(kind, tmp_path / "base")
    assert film_side(load_processor(base)) is None
    data = Dataset.from_dict(
        dict(image=[f.resize((112, 112)) for f in FILMS], report=["a"] * 3),
        features=Features(image=ImageColumn(), report=Value("string")),
    )
    sft(
        base,
        conversations(data, ["the heart is enlarged"] * 3),
        tmp_path / "sft",
        epochs=1,
        batch_size=3,
        mode="lora",
        lora_r=2,
    )
    model, processor = load_policy(tmp_path / "sft")
    assert film_side(processor) == 112
    model.save_pretrained(tmp_path / "again")
    large = np.random.default_rng(0).integers(0, 255, (764, 636), dtype=np.uint8)
    Image.fromarray(large).save(tmp_path / "film.png")
    seen, shown = [], type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, **kw: seen.append(kw["input_ids"].shape[1]) or shown(self, **kw)
    )
    write_reports(model, processor, [("film", tmp_path / "film.png")], tmp_path / "out.jsonl", 2)
    generate(model, processor, [data[0]["image"]], 2)
    assert seen[0] == seen[1] and square(large, 112).size == (112, 112)
    get_peft_model(model, lora_config(model, "language", 2, 4)).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "sft", tmp_path / "adapter", tmp_path / "merged")
    assert film_side(load_processor(tmp_path / "merged")) == 112  # it goes along
