"""Scoring candidates in one row with their prompt: it is read once, with gradients and with checkpointing."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from valor.train.decode import attention_configs
from valor.train.prompts import BY_TOKEN

PACKED = "valor_packed_prompts"  # the name under which transformers' models find `attend_packed`


@dataclass(frozen=True)
class Packing:
    """How a row is packed: `prompt` tokens that all share, then `group` candidates of `length` tokens each;
    `mask` `(P, prompt)`: which of the prompts' tokens are no padding, None where all are."""

    prompt: int
    group: int
    length: int
    mask: torch.Tensor | None


def attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kw: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in packed rows `(P, H, prompt + G × length, D)`: a prompt attends to itself, a candidate to its prompt
    and to itself. Without `packing` it is transformers' own (`sdpa`)."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kw
        )
    n, parts = packing.prompt, (query, key, value)
    within = None if attention_mask is None else attention_mask[..., :n, :n]
    read = sdpa_attention_forward(
        module, *(x[:, :, :n] for x in parts), within, dropout=dropout, scaling=scaling, **kw
    )[0]
    q, k, v = (_by_candidate(x[:, :, n:], packing) for x in parts)
    k, v = (torch.cat([_for_each(x[:, :, :n], packing), own], 2) for x, own in ((key, k), (value, v)))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=_mask(q, packing, sliding_window),
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=True,
    )
    out = out.view(len(query), packing.group, *out.shape[1:]).permute(0, 1, 3, 2, 4)
    return torch.cat([read, out.flatten(1, 2)], 1), None


def _by_candidate(x: torch.Tensor, packing: Packing) -> torch.Tensor:
    "`(P, H, G × T, D)` → `(P × G, H, T, D)`."
    P, heads, _, width = x.shape
    return x.view(P, heads, packing.group, packing.length, width).transpose(1, 2).flatten(0, 1)


def _for_each(x: torch.Tensor, packing: Packing) -> torch.Tensor:
    "`(P, H, S, D)` → `(P × G, H, S, D)`, every prompt once for each of its candidates."
    return x[:, None].expand(-1, packing.group, -1, -1, -1).flatten(0, 1)


def _mask(q: torch.Tensor, packing: Packing, window: int | None) -> Any:
    "What the candidates may attend to: True `(P × G, 1, T, prompt + T)`, or torch's own causal mask where that is all."
    T, n = packing.length, packing.prompt
    window = window if window and window < n + T else None
    if packing.mask is None and window is None and q.is_cuda:
        return causal_lower_right(T, n + T)
    here = torch.arange(n, n + T, device=q.device)[:, None]
    there = torch.arange(n + T, device=q.device)
    seen = there <= here
    if window:
        seen = seen & (here - there < window)
    if packing.mask is None:
        return seen[None, None]
    real = F.pad(packing.mask.bool(), (0, T), value=True).repeat_interleave(packing.group, 0)
    return seen & real[:, None, None]


AttentionInterface.register(PACKED, attend_packed)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def can_pack(policy: PreTrainedModel) -> bool:
    "Whether the language model of `policy` takes its attention from transformers' interface, as `sdpa` at present."
    return all(config._attn_implementation in ("sdpa", PACKED) for config in attention_configs(policy))


def use_packing(policy: PreTrainedModel) -> None:
    "Let the language model of `policy` take packed rows from now on; other calls give what they gave."
    for config in attention_configs(policy):
        config._attn_implementation = PACKED


def score_packed(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities and entropies `(N, T)` of the candidates `ids` `(N, T)`, N = P × G in the order of the P
    prompts `inputs`; `mask` is 0 behind a candidate's end.

    `inputs` hold the prompts' `position_ids` (see `read_prompts`); `use_packing` was called on the model."""
    P, (N, T) = len(inputs["input_ids"]), ids.shape
    G, n = N // P, inputs["input_ids"].shape[1] - 1
    prompt_mask = inputs["attention_mask"][:, :n]
    packing = Packing(n, G, T, None if bool(prompt_mask.all()) else prompt_mask)
    last = inputs["input_ids"][:, -1:].repeat_interleave(G, 0)
    fed = torch.cat([last, ids[:, :-1]], 1).view(P, G * T)
    by_token = {name: F.pad(inputs[name][:, :n], (0, G * T)) for name in BY_TOKEN[2:] if name in inputs}
    labels = ids.masked_fill(mask == 0, -100).view(P, G * T)
    out = model(
        input_ids=torch.cat([inputs["input_ids"][:, :n], fed], 1),
        attention_mask=F.pad(prompt_mask, (0, G * T), value=1),
        position_ids=packed_positions(inputs["position_ids"], G, T),
        shift_labels=F.pad(labels, (n, 0), value=-100),
        fused_lm_head=True,
        packing=packing,
        **{name: x for name, x in inputs.items() if name not in (*BY_TOKEN, "position_ids")},
        **by_token,
    )
    entropy = None if out.entropy is None else out.entropy[:, n:].reshape(N, T)
    return out.log_probs[:, n:].reshape(N, T), entropy


def packed_positions(of_prompts: torch.Tensor, group: int, length: int) -> torch.Tensor:
    "Positions `(…, P, L)` of the prompts → of packed rows: each of `group` candidates begins at the last one's."
    own = of_prompts[..., -1:] + torch.arange(length, device=of_prompts.device)
    return torch.cat([of_prompts[..., :-1], own.repeat(*[1] * (own.ndim - 1), group)], -1)
