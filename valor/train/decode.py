"""Sampling with static room: each prompt's keys are held once for its group, and one CUDA graph is a token."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..policy.adapter import join
from . import kernels

ATTENTION = "valor_shared_prompts"  # the name under which transformers' models find `attend`


class RoomLayer(CacheLayerMixin):
    """What attention keeps in one layer of a `Room`: the prompts' keys and values `(P, KV, S, D)`, right-aligned,
    and those of the drawn tokens `(N, KV, T, D)`, written in place."""

    is_compileable = True

    def __init__(self, room: "Room", read: DynamicLayer):
        super().__init__()
        heads, held, width = read.keys.shape[1:]
        prompts, drawn = (room.prompts, heads, room.slots, width), (room.rows, heads, room.more, width)
        self.prompt_keys, self.prompt_values = (read.keys.new_zeros(prompts) for _ in range(2))
        self.keys, self.values = (read.keys.new_zeros(drawn) for _ in range(2))
        self.room, self.held, self.is_initialized = room, held, True

    def fill(self, read: DynamicLayer) -> None:
        "Take the keys and values of the prompts from `read`; a sliding window's layer holds the last of them alone."
        self.held = read.keys.shape[2]
        for own, theirs in ((self.prompt_keys, read.keys), (self.prompt_values, read.values)):
            own[:, :, self.room.slots - self.held :] = theirs

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kw: Any) -> tuple:
        "Write the keys and values `(N, KV, 1, D)` of the newest token."
        if self.room.fast:
            kernels.write_token(self.keys, self.values, keys, values, self.room.at)
        else:
            self.keys.index_copy_(2, self.room.at, keys.to(self.keys.dtype))
            self.values.index_copy_(2, self.room.at, values.to(self.values.dtype))
        return keys, values

    def lazy_initialization(self, *args: Any) -> None:
        pass

    def get_seq_length(self) -> int:
        return self.room.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.room.slots + query_length, 0

    def get_max_length(self) -> int:
        return self.room.slots + self.room.more


class Room:
    """Room for N = P × G candidates of P prompts, at fixed addresses: what one token reads and writes.

    `slots`: tokens that a prompt may have, its last one apart; `more`: tokens that may be drawn."""

    def __init__(self, prompts: int, group: int, slots: int, more: int, device: torch.device):
        self.prompts, self.group, self.rows, self.slots, self.more = (
            prompts,
            group,
            prompts * group,
            slots,
            more,
        )

        def numbers(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.at = numbers(1)  # how many tokens have been drawn
        self.first = numbers(prompts)  # the first slot of each prompt that is not padding
        self.last = numbers(self.rows, 1)  # each candidate's newest token
        self.done = numbers(self.rows, dtype=torch.bool)
        self.lengths = numbers(self.rows)
        self.tokens = numbers(self.rows, more)
        self.logps = numbers(self.rows, more, dtype=torch.float32)
        self.positions = None  # of the newest token before anything is drawn, as the model wants them
        self.cache, self.fast, self.written = None, False, None

    def fits(self, prompts: int, group: int, slots: int, more: int) -> bool:
        "Whether a batch of that shape has a place here."
        return (prompts, group, more) == (self.prompts, self.group, self.more) and slots <= self.slots

    def begin(self, read: Cache, inputs: dict[str, torch.Tensor], positions: torch.Tensor) -> None:
        "Take over what was `read` of the prompts `inputs` and forget what was drawn before."
        if self.cache is None:
            self.cache = Cache(layers=[RoomLayer(self, layer) for layer in read.layers])
        for own, theirs in zip(self.cache.layers, read.layers):
            own.fill(theirs)
        mask = inputs["attention_mask"]
        self.padded = mask.is_cuda or not bool(mask.all())  # on a GPU a graph serves batches of both kinds
        self.first.copy_(self.slots - (mask.sum(1) - 1))
        self.start = inputs["input_ids"][:, -1:].repeat_interleave(self.group, 0)
        if self.positions is None:
            self.positions = positions.clone()
        self.positions.copy_(positions)
        self.again()

    def unseen(self, until: int, window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the newest token may not attend to: slots of its prompt `(N, slots)` and, of the first `until` places
        for drawn tokens, `(until,)`; None where it may attend to all. `window`: of a sliding attention."""
        at, hidden, unseen = self.at, None, None
        if self.padded or window:
            slot = torch.arange(self.slots, device=at.device)
            hidden = slot < self.first[:, None]
            if window:
                hidden = hidden | (self.slots + at - slot >= window)
            hidden = hidden.repeat_interleave(self.group, 0)
        if self.written is None or window:
            drawn = torch.arange(until, device=at.device)
            unseen = drawn > at
            if window:
                unseen = unseen | (at - drawn >= window)
        return hidden, unseen

    def again(self) -> None:
        "Back to the prompts' last tokens; nothing is drawn yet."
        for x in (self.at, self.done, self.lengths):
            x.zero_()
        self.last.copy_(self.start)


def plain_attention(
    room: Room, layer: RoomLayer, q: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Attention of the newest token `q` `(N, H, 1, D)` to its prompt and to what was drawn, `(N, 1, H, D)`.

    The candidates of a prompt are further queries to the same keys; nothing is copied."""
    P, G, N = room.prompts, room.group, room.rows
    kv, width = layer.keys.shape[1], layer.keys.shape[3]
    each = q.shape[1] // kv  # query heads that share a key head
    until = room.more if room.written is None else room.written + 1
    ours = q.reshape(N, kv, each, width)
    by_prompt = ours.view(P, G, kv, each, width).transpose(1, 2).reshape(P, kv, G * each, width)
    to_prompt = (by_prompt @ layer.prompt_keys.transpose(-1, -2)).view(P, kv, G, each, room.slots)
    to_prompt = to_prompt.transpose(1, 2).reshape(N, kv, each, room.slots)
    to_drawn = ours @ layer.keys[:, :, :until].transpose(-1, -2)
    hidden, unseen = room.unseen(until, window)
    if hidden is not None:
        to_prompt = to_prompt.masked_fill(hidden[:, None, None], float("-inf"))
    if unseen is not None:
        to_drawn = to_drawn.masked_fill(unseen, float("-inf"))
    weights = (torch.cat([to_prompt, to_drawn], -1).float() * scaling).softmax(-1).to(q.dtype)
    on_prompt = weights[..., : room.slots].reshape(P, G, kv, each, room.slots).transpose(1, 2)
    out = on_prompt.reshape(P, kv, G * each, room.slots) @ layer.prompt_values
    out = out.view(P, kv, G, each, width).transpose(1, 2).reshape(N, kv, each, width)
    out = out + weights[..., room.slots :] @ layer.values[:, :, :until]
    return out.reshape(N, 1, kv * each, width)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    room: Room | None = None,
    **kw: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in a `Room`, as transformers' attention interface calls it; the mask is the room's own.

    Raises NotImplementedError where a model asks for what it does not compute (capped scores, sinks)."""
    odd = sorted(name for name in ("softcap", "s_aux", "head_mask") if kw.get(name) is not None)
    if odd or room is None:
        raise NotImplementedError(f"attention with {', '.join(odd) or 'no room'}")
    layer = room.cache.layers[module.layer_idx]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if room.fast:
        return kernels.attend(room, layer, query, scaling, sliding_window), None
    return plain_attention(room, layer, query, scaling, sliding_window), None


AttentionInterface.register(ATTENTION, attend)


def attention_configs(policy: PreTrainedModel) -> list:
    "The configurations that the layers with a cache of `policy` read their attention's name from."
    layers = [
        m for m in policy.modules() if getattr(m, "layer_idx", None) is not None and hasattr(m, "config")
    ]
    text = policy.config.get_text_config()
    found = {id(m.config): m.config for m in layers if type(m.config) is type(text)}
    return list({id(text): text, **found}.values())


@contextmanager
def attention_named(policy: PreTrainedModel, name: str) -> Iterator[None]:
    "Inside, the language model of `policy` calls the attention that is registered as `name`."
    before = [(config, config._attn_implementation) for config in attention_configs(policy)]
    for config, _ in before:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, old in before:
            config._attn_implementation = old


def draw(logits: torch.Tensor, banned: torch.Tensor) -> torch.Tensor:
    """One token a row of `logits` `(N, V)`, each with its chance, those `banned` `(V,)` never: `(N, 1)`.

    The largest of chance / E, E drawn from an exponential distribution, is such a token; this is what
    torch.multinomial computes, without its checks, which a CUDA graph cannot hold."""
    chances = logits.softmax(-1).masked_fill(banned, 0.0)
    return (chances / torch.empty_like(chances).exponential_()).argmax(-1, keepdim=True)


@contextmanager
def same_dice(device: torch.device) -> Iterator[None]:
    "What is drawn on the GPU `device` inside leaves what is drawn afterwards as it would have been."
    before = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(before, device)


class Sampler:
    """Draws candidates with `policy` (a plain transformers model, or one whose adapter stays beside its weights).

    `ends`: ids of tokens that end a report; `pad`: what follows them. On a GPU the steps are one CUDA graph, which
    is kept as long as batches have the same shape. `said`: told, once, where a graph cannot be captured."""

    def __init__(self, ends: list[int], pad: int, temperature: float, said: Callable[[str], None] = print):
        self.ends, self.pad, self.temperature, self.said = ends, pad, temperature, said
        self.room, self.graph, self.of_graph, self.captures = None, None, None, True

    def __call__(
        self,
        policy: PreTrainedModel,
        read: Cache,
        inputs: dict[str, torch.Tensor],
        positions: torch.Tensor,
        group: int,
        more: int,
        given: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens `(N, ≤ more)`, lengths `(N,)` (the ending token included) and log-probabilities at the temperature
        `(N, ≤ more)` of `group` candidates for each of the prompts `inputs`, of which `read` and `positions` are kept (`read_prompts`).

        `given` `(N, ≤ more)`: tokens to take instead of drawing any."""
        room = self._room(policy, read, inputs, group, more)
        room.begin(read, inputs, positions[..., -1:].repeat_interleave(group, -2))
        if kernels.can_fuse(room) and self.graph is None:
            with attention_named(policy, ATTENTION), same_dice(room.at.device):
                join(policy, partial(self._step, policy, room))
            room.again()
        with attention_named(policy, ATTENTION), kernels.faster(policy, room):
            n = self._draw(policy, room, given)
        return room.tokens[:, :n].clone(), room.lengths.clone(), room.logps[:, :n].clone()

    def _banned(self, policy: PreTrainedModel, device: torch.device) -> torch.Tensor:
        "`(V,)`: True for tokens that are never drawn (those that stand for images)."
        never = policy.generation_config.suppress_tokens or []
        banned = torch.zeros(policy.get_output_embeddings().weight.shape[0], dtype=torch.bool)
        banned[never] = True
        return banned.to(device)

    def _room(
        self, policy: PreTrainedModel, read: Cache, inputs: dict[str, torch.Tensor], group: int, more: int
    ) -> Room:
        "The room that is there where the batch fits, otherwise a new one (and no graph: it held the old one's addresses)."
        (prompts, length), device = inputs["input_ids"].shape, inputs["input_ids"].device
        slots = length - 1 if device.type == "cpu" else -(-(length - 1) // 64) * 64
        fits = self.room and self.room.fits(prompts, group, slots, more)
        if not fits or (device.type == "cpu" and self.room.slots != slots):
            self.graph, self.room = None, Room(prompts, group, slots, more, device)
            self.room.banned = self._banned(policy, device)
            self.room.ending = torch.tensor(self.ends, dtype=torch.long, device=device)
        return self.room

    def _draw(self, policy: PreTrainedModel, room: Room, given: torch.Tensor | None) -> int:
        "Draw until every row has ended; returns how many tokens the longest has."
        if room.at.device.type == "cuda" and given is None and self.captures:
            if self.graph is None or self.of_graph is not policy:
                with same_dice(room.at.device):
                    self._capture(policy, room)
            if self.graph is not None:
                return self._replay(room)
        longest = room.more if given is None else given.shape[1]
        for t in range(longest):
            room.written = t if room.at.device.type == "cpu" else None
            self._step(policy, room, None if given is None else given[:, t : t + 1])
            if given is None and (room.at.device.type == "cpu" or t % 16 == 15) and room.done.all():
                return t + 1
        return longest

    def _step(self, policy: PreTrainedModel, room: Room, given: torch.Tensor | None = None) -> None:
        "One token for every row. Rows that have ended get padding."
        logits = policy(
            input_ids=room.last,
            position_ids=room.positions + room.at,
            past_key_values=room.cache,
            use_cache=True,
            logits_to_keep=1,
            room=room,
        ).logits[:, -1]
        logits = logits.float() / self.temperature
        new = draw(logits, room.banned) if given is None else given
        if given is None:
            new = new.masked_fill(room.done[:, None], self.pad)
        room.logps.index_copy_(1, room.at, logits.gather(1, new) - logits.logsumexp(-1, keepdim=True))
        room.tokens.index_copy_(1, room.at, new)
        room.lengths.add_(~room.done)
        room.done.logical_or_(torch.isin(new[:, 0], room.ending))
        room.last.copy_(new)
        room.at.add_(1)

    def _capture(self, policy: PreTrainedModel, room: Room) -> None:
        "Record one step as a CUDA graph; where that cannot be done, say why and draw without."
        device, room.written = room.at.device, None
        try:
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._step(policy, room)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(policy, room)
            self.graph, self.of_graph = graph, policy
        except (RuntimeError, NotImplementedError) as e:
            if isinstance(e, torch.OutOfMemoryError):
                raise
            torch.cuda.synchronize(device)
            self.graph, self.captures = None, False
            reason = str(e).strip().splitlines()[0]
            self.said(
                f"rollout: a step cannot be captured as a CUDA graph ({reason}); drawing goes on without one"
            )
        room.again()

    def _replay(self, room: Room) -> int:
        for t in range(room.more):
            self.graph.replay()
            if t % 16 == 15 and room.done.all():
                return t + 1
        return room.more


def room_for(read: Cache) -> bool:
    "Whether every layer of what was `read` of the prompts is of a kind that `Room` can hold."
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in read.layers)
