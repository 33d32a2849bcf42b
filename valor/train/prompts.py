"""Which candidates share a prompt, and a prompt that is read once for all of them."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def distinct_prompts(prompts: list[list[dict]]) -> tuple[list[int], list[int]]:
    """`(first, of)`: where the distinct conversations of the list `prompts` first occur, and for each
    prompt its place among them."""

    def seen(part: dict) -> dict | list:
        if part["type"] != "image":
            return part
        return [part["image"].size, hashlib.sha256(part["image"].tobytes()).hexdigest()]

    keys = [json.dumps([[m["role"], [seen(p) for p in m["content"]]] for m in prompt]) for prompt in prompts]
    place = {k: i for i, k in enumerate(dict.fromkeys(keys))}
    return [keys.index(k) for k in place], [place[k] for k in keys]


def by_prompt(of: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`(which, group)`: the prompts that the rows `of` `(N,)` answer, in order, and how many rows answer each.

    Where rows of a prompt lie apart or prompts have different numbers of rows, every row counts as a prompt of its
    own: `(of, 1)`. That costs time and changes no result."""
    which, counts = of.unique_consecutive(return_counts=True)
    if len(which.unique()) == len(which) and bool((counts == counts[0]).all()):
        return which, int(counts[0])
    return of, 1


def collate(prompts: list[dict], pad_token_id: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Model inputs of several prepared prompts (dicts of tensors, one prompt each): by-token fields
    padded on the left, by-image fields joined end to end."""
    length = max(p["input_ids"].shape[1] for p in prompts)

    def joined(name: str) -> torch.Tensor:
        parts = [p[name] for p in prompts]
        if name not in (*BY_TOKEN, "position_ids"):
            return torch.cat(parts)
        fill = pad_token_id if name == "input_ids" else 0
        return torch.cat([F.pad(x, (length - x.shape[-1], 0), value=fill) for x in parts], -2)

    return {name: joined(name).to(device) for name in prompts[0]}


def count_positions(mask: torch.Tensor) -> torch.Tensor:
    "The place of every token among those that `mask` `(N, L)` does not hide."
    return (mask.cumsum(-1) - 1).clamp(min=0)


def read_prompts(
    model: torch.nn.Module, base: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[Cache, torch.Tensor]:
    """What attention keeps of the prompts `inputs` `(P, L)` without their last tokens, a transformers cache; and the
    positions of all their tokens, `(P, L)`, or `(4, P, L)` where the model counts images in three dimensions (Qwen-VL).

    `base` is the model inside the wrappers of `model`."""
    cut = {name: x[:, :-1] if name in BY_TOKEN else x for name, x in inputs.items()}
    text = count_positions(inputs["attention_mask"])
    if not hasattr(base.base_model, "rope_deltas"):
        return model(**cut, position_ids=text[:, :-1], use_cache=True, logits_to_keep=1).past_key_values, text
    seen = []
    hook = base.base_model.language_model.register_forward_pre_hook(
        lambda module, args, kw: seen.append(kw["position_ids"]), with_kwargs=True
    )
    try:
        read = model(**cut, use_cache=True, logits_to_keep=1).past_key_values
    finally:
        hook.remove()
    last = (text[:, -1:] + base.base_model.rope_deltas.to(text)).expand(3, -1, -1)
    return read, torch.cat([text[None], torch.cat([seen[0][-3:].to(text), last], -1)])


class ImagesOnce:
    """Lets the frozen vision tower of `policy` see each image of a generation once: what it made of an image in the
    rollout serves the reference and the update. For towers that take one row an image (LLaVA, Gemma 3); others,
    and those that an adapter reaches, see every image as often as before."""

    def __init__(self, policy: PreTrainedModel):
        self.tower = getattr(policy.base_model, "vision_tower", None)
        self.layer = getattr(policy.config, "vision_feature_layer", -1)
        self.kept, self.coming = {}, None
        if self.tower is not None:
            self._own = self.tower.forward
            self.tower.forward = self._forward

    def forget(self) -> None:
        "Begin a new generation."
        self.kept = {}

    @contextmanager
    def coming_from(self, images: list[tuple[int, int]]) -> Iterator[None]:
        "Inside, the rows that the tower is given are these `(prompt, image of it)`."
        self.coming = images
        try:
            yield
        finally:
            self.coming = None

    def _forward(self, pixel_values: torch.Tensor, *args: Any, **kw: Any) -> Any:
        frozen = not any(p.requires_grad for p in self.tower.parameters())
        if not frozen or self.coming is None or len(self.coming) != len(pixel_values):
            return self._own(pixel_values, *args, **kw)
        missing = [row for row, image in enumerate(self.coming) if image not in self.kept]
        if missing:
            with torch.no_grad():
                made = self._own(pixel_values[missing], *args, **kw)
            for place, row in enumerate(missing):
                self.kept[self.coming[row]] = self._fields(made, place)
            self.kind = type(made)
        rows = [self.kept[image] for image in self.coming]
        return self.kind(**{name: _joined([row[name] for row in rows]) for name in rows[0]})

    def _fields(self, made: Any, place: int) -> dict:
        "What the tower `made` of one image; of its hidden states those that the policy reads."
        wanted = {self.layer} if isinstance(self.layer, int) else set(self.layer)
        fields = {}
        for name, value in made.items():
            if torch.is_tensor(value):
                fields[name] = value[place : place + 1]
            elif name == "hidden_states":
                read = {i % len(value) for i in wanted}
                fields[name] = tuple(x[place : place + 1] if i in read else None for i, x in enumerate(value))
        return fields


def _joined(values: list) -> Any:
    "Tensors of one image each → one tensor; tuples of them likewise."
    if isinstance(values[0], tuple):
        return tuple(_joined(list(parts)) for parts in zip(*values))
    return None if values[0] is None else torch.cat(values)
