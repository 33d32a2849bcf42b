"""Fused kernels for one sampled token on a GPU: norms, rotations, attention to a shared prompt, joined products."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from valor.policy.adapter import Joint, joint_of

if find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def _rms_norm(x, weight, out, row, out_row, width, eps, ONE_PLUS: tl.constexpr, BLOCK: tl.constexpr):
        "One row of RMSNorm; ONE_PLUS: Gemma's, which multiplies by 1 + weight in float32."
        i = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(x + i * row + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(weight + columns, mask=inside, other=0.0)
        normal = value * tl.rsqrt(tl.sum(value * value) / width + eps)
        if ONE_PLUS:
            result = normal * (1.0 + scale.to(tl.float32))
        else:
            result = normal.to(scale.dtype).to(tl.float32) * scale.to(tl.float32)
        tl.store(out + i * out_row + columns, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotate(q, out, cos, sin, q_row, q_head, angle_row, heads, HALF: tl.constexpr):
        "One head of one row: x cos + rotate_half(x) sin, rounded where transformers rounds."
        n, h = tl.program_id(0), tl.program_id(1)
        d = tl.arange(0, HALF)
        low = tl.load(q + n * q_row + h * q_head + d)
        high = tl.load(q + n * q_row + h * q_head + HALF + d)
        kind = low.dtype
        cos_low = tl.load(cos + n * angle_row + d).to(tl.float32)
        cos_high = tl.load(cos + n * angle_row + HALF + d).to(tl.float32)
        sin_low = tl.load(sin + n * angle_row + d).to(tl.float32)
        sin_high = tl.load(sin + n * angle_row + HALF + d).to(tl.float32)
        low, high = low.to(tl.float32), high.to(tl.float32)
        first = (low * cos_low).to(kind).to(tl.float32) - (high * sin_low).to(kind).to(tl.float32)
        second = (high * cos_high).to(kind).to(tl.float32) + (low * sin_high).to(kind).to(tl.float32)
        to = out + (n * heads + h) * 2 * HALF + d
        tl.store(to, first.to(kind))
        tl.store(to + HALF, second.to(kind))

    @triton.jit
    def _write_token(
        keys, values, key, value, at, k_row, k_head, v_row, v_head, heads, more, WIDTH: tl.constexpr
    ):
        "The newest key and value of one head of one row, into their place."
        n, h = tl.program_id(0), tl.program_id(1)
        d = tl.arange(0, WIDTH)
        to = ((n * heads + h) * more + tl.load(at)) * WIDTH + d
        tl.store(keys + to, tl.load(key + n * k_row + h * k_head + d))
        tl.store(values + to, tl.load(value + n * v_row + h * v_head + d))

    @triton.jit
    def _gate(gate, up, out, g_row, u_row, out_row, width, BLOCK: tl.constexpr):
        "silu(gate) × up, rounded where transformers rounds."
        n = tl.program_id(0)
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = c < width
        g = tl.load(gate + n * g_row + c, mask=inside, other=0.0)
        u = tl.load(up + n * u_row + c, mask=inside, other=0.0)
        wide = g.to(tl.float32)
        active = (wide / (1.0 + tl.exp(-wide))).to(g.dtype)
        tl.store(out + n * out_row + c, (active.to(tl.float32) * u.to(tl.float32)).to(g.dtype), mask=inside)

    @triton.jit
    def _to_prompt(
        q, keys, values, first, at, part, top, total, q_row, q_head, slots, heads, group, each, chunk, scale,
        ROWS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    ):  # fmt: skip
        "The candidates of one prompt, one key head, one chunk of the prompt: an unfinished softmax in `part`."
        head, c, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        p, kv = head // heads, head % heads
        r = block * ROWS + tl.arange(0, ROWS)
        real = r < group * each
        n, h = p * group + r // each, kv * each + r % each
        d = tl.arange(0, WIDTH)
        query = tl.load(
            q + n[:, None] * q_row + h[:, None] * q_head + d[None, :], mask=real[:, None], other=0.0
        )
        begin = tl.load(first + p)
        if WINDOW > 0:
            begin = tl.maximum(begin, slots + tl.load(at) - WINDOW + 1)
        best = tl.full([ROWS], -1e30, tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, WIDTH], tl.float32)
        for s in range(c * chunk, tl.minimum(c * chunk + chunk, slots), STEP):
            slot = s + tl.arange(0, STEP)
            seen = (slot >= begin) & (slot < slots)
            where = head * slots * WIDTH + slot[:, None] * WIDTH + d[None, :]
            k = tl.load(keys + where, mask=seen[:, None], other=0.0)
            v = tl.load(values + where, mask=seen[:, None], other=0.0)
            score = tl.dot(query, tl.trans(k)) * scale
            score = tl.where(seen[None, :], score, -1e30)
            newest = tl.maximum(best, tl.max(score, 1))
            weight = tl.where(seen[None, :], tl.exp2(score - newest[:, None]), 0.0)
            shrink = tl.exp2(best - newest)
            mass = mass * shrink + tl.sum(weight, 1)
            sums = sums * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
            best = newest
        row = (c * tl.num_programs(0) // heads * group * heads * each) + n * heads * each + h
        tl.store(part + row[:, None] * WIDTH + d[None, :], sums, mask=real[:, None])
        tl.store(top + row, best, mask=real)
        tl.store(total + row, mass, mask=real)

    @triton.jit
    def _to_drawn(
        q, keys, values, at, part, top, total, out, q_row, q_head, rows, heads, more, each, chunks, scale,
        EACH: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    ):  # fmt: skip
        "One candidate, one key head: attention to what it has drawn, joined with the chunks of its prompt."
        head = tl.program_id(0)
        n, kv = head // heads, head % heads
        e = tl.arange(0, EACH)
        real = e < each
        h = kv * each + e
        d = tl.arange(0, WIDTH)
        query = tl.load(q + n * q_row + h[:, None] * q_head + d[None, :], mask=real[:, None], other=0.0)
        end = tl.load(at) + 1
        begin = end * 0
        if WINDOW > 0:
            begin = tl.maximum(end - WINDOW, 0)
        best = tl.full([EACH], -1e30, tl.float32)
        mass = tl.zeros([EACH], tl.float32)
        sums = tl.zeros([EACH, WIDTH], tl.float32)
        for s in range(begin // STEP * STEP, end, STEP):
            slot = s + tl.arange(0, STEP)
            seen = (slot >= begin) & (slot < end)
            where = head * more * WIDTH + slot[:, None] * WIDTH + d[None, :]
            k = tl.load(keys + where, mask=seen[:, None], other=0.0)
            v = tl.load(values + where, mask=seen[:, None], other=0.0)
            score = tl.where(seen[None, :], tl.dot(query, tl.trans(k)) * scale, -1e30)
            newest = tl.maximum(best, tl.max(score, 1))
            weight = tl.where(seen[None, :], tl.exp2(score - newest[:, None]), 0.0)
            shrink = tl.exp2(best - newest)
            mass = mass * shrink + tl.sum(weight, 1)
            sums = sums * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
            best = newest
        for c in range(chunks):
            row = c * rows * heads * each + n * heads * each + h
            other = tl.load(top + row, mask=real, other=-1e30)
            newest = tl.maximum(best, other)
            mine, theirs = tl.exp2(best - newest), tl.exp2(other - newest)
            mass = mass * mine + tl.load(total + row, mask=real, other=0.0) * theirs
            there = tl.load(part + row[:, None] * WIDTH + d[None, :], mask=real[:, None], other=0.0)
            sums = sums * mine[:, None] + there * theirs[:, None]
            best = newest
        result = (sums / mass[:, None]).to(out.dtype.element_ty)
        tl.store(out + (n * heads * each + h[:, None]) * WIDTH + d[None, :], result, mask=real[:, None])


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, one_plus: bool, tail: int = 0
) -> torch.Tensor:
    """RMSNorm over the last axis of `x` in one kernel; `one_plus`: Gemma's kind. Each row of the result has `tail`
    numbers of room behind it (see `Joint`)."""
    rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
    out = torch.empty((len(rows), width + tail), dtype=x.dtype, device=x.device)
    _rms_norm[(len(rows),)](
        rows, weight, out, rows.stride(0), width + tail, width, eps, ONE_PLUS=one_plus, BLOCK=next_power_of_two(width)
    )  # fmt: skip
    return out[:, :width].view(x.shape)


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple:
    "Rotary positions on the newest token's `q` `(N, H, 1, D)` and `k` `(N, KV, 1, D)`; cos, sin `(N, 1, D)`."
    cos, sin = cos.expand(len(q), -1, -1).contiguous(), sin.expand(len(q), -1, -1).contiguous()
    turned = []
    for x in (q, k):
        n, heads, _, width = x.shape
        out = torch.empty((n, heads, 1, width), dtype=x.dtype, device=x.device)
        _rotate[(n, heads)](
            x, out, cos, sin, x.stride(0), x.stride(1), cos.stride(0), heads, HALF=width // 2, num_warps=1
        )
        turned.append(out)
    return tuple(turned)


def write_token(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: torch.Tensor
) -> None:
    "Write `key` and `value` `(N, KV, 1, D)` into the room `(N, KV, T, D)` at place `at`."
    n, heads, more, width = keys.shape
    _write_token[(n, heads)](
        keys, values, key, value, at, key.stride(0), key.stride(1), value.stride(0), value.stride(1), heads, more,
        WIDTH=width, num_warps=1,
    )  # fmt: skip


def gated(gate: torch.Tensor, up: torch.Tensor, tail: int = 0) -> torch.Tensor:
    "silu(gate) × up, both `(N, 1, I)`, in one kernel; `tail`: room behind each row (see `Joint`)."
    n, width = gate.shape[0], gate.shape[-1]
    out = torch.empty((n, 1, width + tail), dtype=gate.dtype, device=gate.device)
    _gate[(n, -(-width // 1024))](
        gate, up, out, gate.stride(0), up.stride(0), width + tail, width, BLOCK=1024
    )
    return out[..., :width]


# Steps and warps of the two attention kernels: the fastest of sixteen settings on an H200, at 20, 128 and 250 drawn
# tokens alike. A prompt is cut into as many chunks as fill the multiprocessors once.
PROMPT_STEP, PROMPT_WARPS, DRAWN_STEP, DRAWN_WARPS = 64, 4, 32, 2


def chunk_of(slots: int, programs: int, device: torch.device) -> int:
    "How many of a prompt's `slots` tokens one of its chunks takes, where `programs` of them run for each chunk."
    chunks = max(1, torch.cuda.get_device_properties(device).multi_processor_count // programs)
    return -(-slots // (chunks * PROMPT_STEP)) * PROMPT_STEP


def attend(room: Any, layer: Any, q: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
    """As `valor.train.decode.plain_attention`, in two kernels: to the prompt in chunks, all candidates of it at
    once; then to what was drawn, which joins the chunks."""
    n, heads, _, width = q.shape
    kv = layer.keys.shape[1]
    each = heads // kv
    rows = min(64, max(16, next_power_of_two(room.group * each)))
    blocks = -(-room.group * each // rows)
    chunk = chunk_of(room.slots, room.prompts * kv * blocks, q.device)
    chunks = -(-room.slots // chunk)
    scale = scaling * 1.4426950408889634  # powers of two instead of e
    part = torch.empty((chunks, n, heads, width), dtype=torch.float32, device=q.device)
    top, total = (torch.empty((chunks, n, heads), dtype=torch.float32, device=q.device) for _ in range(2))
    _to_prompt[(room.prompts * kv, chunks, blocks)](
        q, layer.prompt_keys, layer.prompt_values, room.first, room.at, part, top, total, q.stride(0), q.stride(1),
        room.slots, kv, room.group, each, chunk, scale,
        ROWS=rows, STEP=PROMPT_STEP, WIDTH=width, WINDOW=window or 0, num_warps=PROMPT_WARPS,
    )  # fmt: skip
    out = torch.empty((n, 1, heads, width), dtype=q.dtype, device=q.device)
    _to_drawn[(n * kv,)](
        q, layer.keys, layer.values, room.at, part, top, total, out, q.stride(0), q.stride(1), n, kv, room.more, each,
        chunks, scale,
        EACH=max(16, next_power_of_two(each)), STEP=DRAWN_STEP, WIDTH=width, WINDOW=window or 0, num_warps=DRAWN_WARPS,
    )  # fmt: skip
    return out


def can_fuse(room: Any) -> bool:
    "Whether the kernels here serve `room`: 16 bits on a GPU, heads of 16, 32, 64, ... numbers."
    keys = room.cache.layers[0].keys
    wide = all(power_of_two(layer.keys.shape[3]) and layer.keys.shape[3] >= 16 for layer in room.cache.layers)
    return (
        bool(find_spec("triton")) and keys.is_cuda and keys.dtype in (torch.bfloat16, torch.float16) and wide
    )


@contextmanager
def faster(policy: PreTrainedModel, room: Any) -> Iterator[None]:
    """Inside, the language model of `policy` computes its norms, rotations, gates and the products that share an
    input with the kernels here, each only where it gives what transformers' own gives on random input."""
    room.fast = can_fuse(room)
    if not room.fast:
        yield
        return
    with ExitStack() as undo:
        for module in policy.base_model.language_model.modules():
            replacement = _replacement(module)
            if replacement:
                _put(undo, module, "forward", replacement)
        for owner in {m.__class__.__module__ for m in policy.modules() if hasattr(m, "layer_idx")}:
            theirs = getattr(sys.modules[owner], "apply_rotary_pos_emb", None)
            if theirs and _same_rotation(theirs, room):
                _put(undo, sys.modules[owner], "apply_rotary_pos_emb", _one_token(theirs))
        for joint in _joints(policy):
            joint.refresh()
            for place, layer in enumerate(joint.layers):
                _put(undo, layer, "forward", partial(joint.forward, place, layer.forward))
        try:
            yield
        finally:
            room.fast = False


def _put(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    "Set an attribute until `undo` ends."
    own = vars(owner).get(name)
    setattr(owner, name, value)
    undo.callback(lambda: setattr(owner, name, own) if own is not None else delattr(owner, name))


def _replacement(module: torch.nn.Module) -> Callable | None:
    "A fused forward of a norm or a gated MLP, None for other modules; which one fits is found once and kept."
    if "fused" not in vars(module):
        kind = type(module).__name__
        module.fused = (
            _norm(module) if kind.endswith("RMSNorm") else _mlp(module) if kind.endswith("MLP") else None
        )
    return vars(module)["fused"]


def _norm(module: torch.nn.Module) -> Callable | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if eps is None or weight is None:
        return None
    module.tail = getattr(module, "tail", 0)
    x = torch.randn(5, 1, weight.shape[0], device=weight.device).to(weight.dtype)
    for one_plus in (False, True):
        if _equal(type(module).forward(module, x), rms_norm(x, weight, eps, one_plus)):
            return lambda hidden_states: rms_norm(hidden_states, weight, eps, one_plus, module.tail)
    return None


def _mlp(module: torch.nn.Module) -> Callable | None:
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if not all(hasattr(module, name) for name in parts):
        return None
    g, u = torch.randn(2, 5, 1, 256, device="cuda").to(torch.bfloat16)
    if not _equal(module.act_fn(g) * u, gated(g, u)):
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        joint = joint_of(module.down_proj)
        return module.down_proj(gated(module.gate_proj(x), module.up_proj(x), joint.tail if joint else 0))

    return forward


def _same_rotation(theirs: Callable, room: Any) -> bool:
    keys = room.cache.layers[0].keys
    q = torch.randn(3, 4, 1, keys.shape[3], device=keys.device).to(keys.dtype)
    cos, sin = torch.randn(2, 3, 1, keys.shape[3], device=keys.device).to(keys.dtype)
    return all(_equal(a, b) for a, b in zip(theirs(q, q, cos, sin), rotate(q, q, cos, sin)))


def _one_token(theirs: Callable) -> Callable:
    def turn(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kw: Any
    ) -> tuple:
        plain = q.shape[2] == 1 and not args and not kw and cos.ndim == 3
        return rotate(q, k, cos, sin) if plain else theirs(q, k, cos, sin, *args, **kw)

    return turn


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    "Equal but for the last bit of some numbers; both are of the order of 1."
    eps = 2 * torch.finfo(a.dtype).eps
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=eps, atol=eps)


def _joints(policy: PreTrainedModel) -> list[Joint]:
    "The joined products of `policy`, each once."
    found = {id(j): j for j in map(joint_of, policy.modules()) if j is not None}
    return list(found.values())
