"""What only a GPU can show: the rollout as a CUDA graph, its kernels against transformers' own code, on every
architecture. Skipped, and so not measured, where there is no GPU."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import set_seed

from valor.policy.models import load_policy
from valor.rewards.radgraph import RadGraph
from valor.testing import KINDS, miniature_policy, miniature_radgraph
from valor.train.decode import Sampler
from valor.train.prompts import collate, read_prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FILMS = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (70, 60 + 20 * i), dtype=np.uint8))
    for i in range(3)
]


def asked(model, processor, films=FILMS):
    "Model inputs of a prompt for each film, of different lengths."
    prompts = []
    for i, film in enumerate(films):
        content = [dict(type="image", image=film), dict(type="text", text="Describe" + " it" * i)]
        prompts.append(
            dict(
                processor.apply_chat_template(
                    [dict(role="user", content=content)],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
            )
        )
    inputs = collate(prompts, processor.tokenizer.pad_token_id, "cuda")
    return {n: x.to(model.dtype) if x.is_floating_point() else x for n, x in inputs.items()}


@torch.no_grad()
def drawn(sampler, model, inputs, group, more, given=None):
    read, positions = read_prompts(model, model, inputs)
    return sampler(model, read, inputs, positions, group, more, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_draws_what_single_steps_score(kind, dtype, tmp_path):
    width = 32 if kind == "qwen2_5_vl" else 64  # Qwen2.5's rotary sections are those of the default miniature
    model, processor = load_policy(miniature_policy(kind, tmp_path / "policy", width=width), dtype)
    model, told = model.cuda().eval(), []
    inputs, ends = asked(model, processor), [processor.tokenizer.eos_token_id, 30, 31, 32]
    sampler = Sampler(ends, processor.tokenizer.pad_token_id, 0.7, told.append)
    set_seed(3)
    tokens, lengths, logps = drawn(sampler, model, inputs, 4, 70)
    assert sampler.graph is not None and not told, told
    graph = sampler.graph
    for row, n in zip(tokens.tolist(), lengths.tolist()):
        assert not set(row[: n - 1]) & set(ends) and set(row[n:]) <= {processor.tokenizer.pad_token_id}
    set_seed(3)
    again = drawn(sampler, model, inputs, 4, 70)
    assert torch.equal(again[0], tokens) and sampler.graph is graph
    plain = Sampler(ends, processor.tokenizer.pad_token_id, 0.7)
    scored = drawn(plain, model, inputs, 4, 70, given=tokens)[2]
    here = torch.arange(tokens.shape[1], device="cuda") < lengths[:, None]
    apart = (scored - logps)[here].abs()
    assert apart.max() < (1e-4 if dtype == torch.float32 else 0.05), apart.max()
    # transformers' own model code, everything at once
    ids = torch.cat([inputs["input_ids"].repeat_interleave(4, 0), tokens], 1)
    images = {n: x for n, x in inputs.items() if n in ("pixel_values", "image_grid_thw")}
    if "image_grid_thw" not in images:
        images = {n: x.repeat_interleave(4, 0) for n, x in images.items()}
        mask = torch.cat([inputs["attention_mask"].repeat_interleave(4, 0), here.long()], 1)
        fields = {
            n: torch.nn.functional.pad(inputs[n].repeat_interleave(4, 0), (0, tokens.shape[1]))
            for n in ("token_type_ids",)
            if n in inputs
        }
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, **images, **fields).logits.float() / 0.7
        theirs = logits[:, -tokens.shape[1] - 1 : -1].log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        apart = (theirs - logps)[here].abs()
        assert apart.mean() < (1e-4 if dtype == torch.float32 else 0.05), apart.mean()


def test_a_graph_draws_from_the_distribution(tmp_path):
    model, processor = load_policy(miniature_policy("llava", tmp_path / "policy", width=64), torch.float32)
    model = model.cuda().eval()
    inputs = asked(model, processor, FILMS[:1])
    sampler = Sampler([], processor.tokenizer.pad_token_id, 1.0)
    first = torch.cat([drawn(sampler, model, inputs, 2048, 2)[0][:, 0] for _ in range(8)])
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1].float()
    logits[:, model.generation_config.suppress_tokens] = float("-inf")
    expected = logits.softmax(-1)[0]
    counts = torch.bincount(first, minlength=len(expected)).float()
    kept = expected * len(first) > 5
    chi = ((counts - expected * len(first)) ** 2 / (expected * len(first)))[kept].sum().item()
    n = int(kept.sum()) - 1
    assert chi < n + 5 * (2 * n) ** 0.5, (chi, n)
    assert sampler.graph is not None


def test_radgraph_reads_on_the_gpu_what_it_reads_on_the_cpu(tmp_path):
    "Its made-up weights decide by small margins, so a few entities may differ by rounding."
    place, _ = miniature_radgraph(tmp_path)
    reports = ["the heart is mildly enlarged . no pleural effusion . " * n for n in (1, 3, 6)] * 4

    def entities(device):
        said = RadGraph(place, device=device).annotate(reports)
        return {(i, e["start_ix"], e["end_ix"], e["label"]) for i, r in enumerate(said) for e in r.values()}

    there, here = entities("cuda"), entities("cpu")
    assert here and len(there ^ here) <= 0.02 * len(here)
