"""The kernels of the rollout against plain torch: on a GPU as they are, elsewhere through Triton's
interpreter, in a process of its own. Skipped where Triton is not installed."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from valor.train import kernels
from valor.train.decode import Room, RoomLayer, plain_attention

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is first imported
EPS = 5e-3 if DEVICE.type == "cuda" else 1e-5  # a GPU's matrix products of float32 have 10 bits of fraction
kernel_test = pytest.mark.skipif(
    DEVICE.type == "cpu" and not INTERPRETED, reason="runs in the interpreter's process"
)


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRETED, reason="the tests below run in this process")
def test_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | dict(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and "10 passed" in done.stdout, done.stdout[-3000:]


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    torch.manual_seed(0)
    if DEVICE.type == "cpu":  # where there are no multiprocessors to fill
        monkeypatch.setattr(kernels, "chunk_of", lambda slots, programs, device: 128)


def numbers(*shape):
    return torch.randn(shape, device=DEVICE)


def by_heads(rows, heads, width=32):
    "`(rows, heads, 1, width)`, laid out as a projection leaves it."
    return numbers(rows, 1, heads, width).transpose(1, 2)


@kernel_test
@pytest.mark.parametrize("one_plus", [False, True])
def test_norm(one_plus):
    x, weight = numbers(6, 1, 96), numbers(96)
    wanted = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight + one_plus)
    for tail in (0, 24):
        got = kernels.rms_norm(x, weight, 1e-5, one_plus, tail)
        assert torch.allclose(got, wanted, atol=1e-5) and got.stride(0) == 96 + tail


@kernel_test
def test_rotation_is_transformers():
    from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

    q, k, (cos, sin) = by_heads(6, 8), by_heads(6, 4), numbers(2, 6, 1, 32)
    for ours, theirs in zip(kernels.rotate(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)):
        assert torch.allclose(ours, theirs, atol=1e-6)


@kernel_test
def test_gate():
    g, u = numbers(2, 6, 1, 2000)
    got = kernels.gated(g, u, 16)
    assert torch.allclose(got, torch.nn.functional.silu(g) * u, atol=1e-6) and got.stride(0) == 2016


# prompts, candidates of each, slots, tokens to draw, query heads per key head, key heads, window
CASES = [
    (2, 3, 200, 150, 4, 2, None),
    (3, 2, 140, 90, 7, 1, 100),
    (1, 5, 64, 70, 2, 2, None),
    (2, 40, 130, 20, 4, 1, 60),
]


def filled(prompts, group, slots, more, kv, width=32):
    "A room and a layer of it with random keys and values; prompts begin in different slots."
    room, read = Room(prompts, group, slots, more, DEVICE), DynamicLayer()
    read.lazy_initialization(*numbers(2, prompts, kv, slots, width))
    read.keys, read.values = numbers(2, prompts, kv, slots, width)
    layer = RoomLayer(room, read)
    layer.fill(read)
    layer.keys.normal_()
    layer.values.normal_()
    room.padded = True
    room.first.copy_(torch.randint(0, 30, (prompts,)))
    return room, layer


@kernel_test
@pytest.mark.parametrize("prompts,group,slots,more,each,kv,window", CASES)
def test_attention_is_the_plain_one(prompts, group, slots, more, each, kv, window):
    room, layer = filled(prompts, group, slots, more, kv)
    for at in sorted({0, min(63, more - 1), min(64, more - 1), more - 1}):
        room.at.fill_(at)
        q = by_heads(room.rows, kv * each)
        ours = kernels.attend(room, layer, q, 0.2, window)
        assert torch.allclose(ours, plain_attention(room, layer, q, 0.2, window), atol=EPS), at


@kernel_test
def test_a_token_is_written_into_its_place():
    room, layer = filled(2, 3, 64, 20, 4)
    before = layer.keys.clone()
    keys, values = by_heads(6, 4), by_heads(6, 4)
    room.at.fill_(5)
    kernels.write_token(layer.keys, layer.values, keys, values, room.at)
    assert torch.equal(layer.keys[:, :, 5:6], keys) and torch.equal(layer.values[:, :, 5:6], values)
    before[:, :, 5:6] = keys
    assert torch.equal(layer.keys, before)


@kernel_test
def test_trying_a_kernel_takes_nothing_from_the_dice_of_the_seed():
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=2)
    state = torch.cuda.get_rng_state if DEVICE.type == "cuda" else torch.get_rng_state
    norm, mlp = LlamaRMSNorm(64).to(DEVICE), LlamaMLP(config).to(DEVICE, torch.bfloat16)
    room = SimpleNamespace(cache=SimpleNamespace(layers=[SimpleNamespace(keys=numbers(1, 1, 1, 32))]))
    before = state()
    assert kernels._norm(norm) and kernels._mlp(mlp) and kernels._same_rotation(apply_rotary_pos_emb, room)
    assert torch.equal(before, state())
