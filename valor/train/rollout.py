"""The trainer whose rollout and update read each prompt once for all of its candidates."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import split_tensor_dict

from ..policy.adapter import KEPT, adapted_layers, adapted_weight, beside, merged_share
from .decode import Sampler, room_for
from .packed import can_pack, score_packed, use_packing
from .prompts import BY_TOKEN, ImagesOnce, by_prompt, collate, distinct_prompts, read_prompts


@contextmanager
def merged(
    model: PeftModel, kept: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> Iterator[PreTrainedModel]:
    """The model inside the PEFT `model` that samples as `model` scores; afterwards every weight is what
    it was, bit for bit.

    Float32 weights take the adapter in. Weights of 16 bits would round most of it away, and quantised ones cannot
    take it: there it stays beside them (`valor.policy.adapter`). `kept`: dict that holds the frozen weights in
    host memory from the first merge on; `dtype`: what the model computes in, where that is not what its weights
    are held in."""
    layers = adapted_layers(model)
    if stays_beside(model, dtype):
        try:
            yield beside(model, holds=True).get_base_model()
        finally:
            beside(model)
        return
    keep(layers, kept)

    def put(of_layer: Callable) -> None:
        for name, layer in layers.items():
            model.set_submodule(name, of_layer(layer))

    try:
        for layer in layers.values():
            layer.merge()
        # the adapter's layers would only look up, each time, that they have nothing to do
        put(lambda layer: layer.get_base_layer())
        yield model.get_base_model()
    finally:
        put(lambda layer: layer)
        restore(layers, kept)


def stays_beside(model: PeftModel, dtype: torch.dtype | None = None) -> bool:
    """Whether the adapter of `model` is sampled beside its weights: anywhere but in float32. `dtype`: as for
    `merged`."""
    held = {adapted_weight(layer).dtype for layer in adapted_layers(model).values()}
    return held != {torch.float32} or dtype not in (None, torch.float32)


def keep(layers: dict, kept: dict[str, torch.Tensor]) -> None:
    """Copy the frozen weights of `layers` (see `adapted_layers`) that are not in the dict `kept` yet into
    it, in host memory."""
    for name, layer in layers.items():
        if name not in kept:
            kept[name] = adapted_weight(layer).detach().to("cpu", copy=True)


def restore(layers: dict, kept: dict[str, torch.Tensor]) -> None:
    """Give `layers` back the frozen weights in `kept`, bit for bit, and take their adapter for one that
    is not merged."""
    for name, layer in layers.items():
        layer.merged_adapters.clear()
        adapted_weight(layer).data.copy_(kept[name])


IMAGE_FIELDS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
    "num_images",
)


def mean_gap(sampled: torch.Tensor, scored: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean |sampled − scored| of log-probabilities `(N, T)` where `mask` is 1 and both are known (vLLM
    leaves some out), as a tensor of one number."""
    apart = (sampled - scored).abs()
    return apart[mask.bool() & ~apart.isnan()].mean()


def gap_alarm(gap: float, noise: float, dtype: torch.dtype = torch.float32, times: float = 1.5) -> str | None:
    """A line where the `gap` between sampled and scored log-probabilities is above `times` that of the
    policy without an adapter (`noise`); otherwise None.

    Up to the precision of `dtype` (.008 in bfloat16), and up to .001, a gap is rounding, however small
    `noise` came out on few tokens."""
    floor = max(1e-3, torch.finfo(dtype).eps)
    if gap <= max(times * noise, floor):
        return None
    expected = f"expected at most {times} times as much, or {floor:.1g}"
    return (
        f"policy/gap is {gap:.2g}, {noise:.2g} without the adapter: what is sampled is not what is scored "
        f"({expected})"
    )


@contextmanager
def _reading(model, temperature):
    """While `model` generates, its log-probabilities at `temperature` are noted: gives a function of the
    token lists that were generated."""
    logps, last = [], []

    def note(module, args, kwargs, out):
        if last:
            logps.append(last.pop().gather(1, kwargs["input_ids"][:, -1:]))
        last.append((out.logits[:, -1].float() / temperature).log_softmax(-1))

    def of(tokens):
        final = last[0].gather(1, torch.tensor([[row[-1]] for row in tokens], device=last[0].device))
        return [row[: len(said)] for row, said in zip(torch.cat([*logps, final], 1).tolist(), tokens)]

    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield of
    finally:
        hook.remove()


class SharedRollout(GRPOTrainer):
    """TRL's GRPO; with `share` each prompt is prepared and read once for all of its candidates, which
    `merged` samples.

    On every road the log has `policy/gap`, the mean |log p when sampled − log p when scored| over sampled
    tokens, and, where TRL or `merged` could add the adapter to weights, `policy/kept`: how much of the
    adapter is in what samples. See `gap_alarm`."""

    share = False

    def __init__(self, *args: Any, share: bool = False, **kw: Any):
        super().__init__(*args, **kw)
        self.share, self._kept, self._processor = share, {}, self.processing_class
        self._scored, self._noise, self._told, self._computes_in = None, None, set(), None
        self._spread = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not self._spread:
            beside(self.model)
        if not self.use_vllm:
            # TRL's own configuration does not ask the model's: tokens that stand for images
            self.generation_config.suppress_tokens = self.model.generation_config.suppress_tokens
        if share and self._spread:
            raise ValueError(
                "rollout='merged': the weights are spread over processes (FSDP, ZeRO); expected "
                "rollout='transformers' or a vLLM one"
            )
        if share:
            self._share_prompts()

    def _share_prompts(self) -> None:
        "Make ready for prompts that are read once; a model whose attention cannot be reached goes TRL's way."
        base = self._base(self.model)
        if can_pack(base):
            use_packing(base)
            pad = self._tokenizer.pad_token_id
            self._once = ImagesOnce(base)
            self._sampler = Sampler(self.eos_token_ids, pad, self.temperature, self._say)
            return
        self.share = False
        self._say(
            f"rollout='merged': {type(base).__name__} has attn_implementation="
            f"{base.config.get_text_config()._attn_implementation!r}, where each prompt cannot be read once "
            f"(expected 'sdpa'); rollout and update go TRL's way (rollout='transformers')"
        )

    def _say(self, line: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(line)

    def _prepare_inputs(self, generation_batch: dict) -> dict:
        """As TRL's, but a generation is cut into its parts in order, so that a part holds whole groups; TRL shuffles
        it first. The gradient of an update is the same sum."""
        if not (self.share and self.model.training):
            return super()._prepare_inputs(generation_batch)
        parts = self.args.steps_per_generation
        if self._step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = split_tensor_dict(
                self._generate_and_score_completions(generation_batch), parts
            )
        return self._buffered_inputs[self._step % parts]

    def _tokenize_prompts(self, prompts):
        if not self.share:
            return super()._tokenize_prompts(prompts)
        first, of = distinct_prompts(prompts)
        self._once.forget()
        self._of, self._prepared = torch.tensor(of), [self._prepare(prompts[i]) for i in first]
        self._images = [
            sum(part["type"] == "image" for m in prompts[i] for part in m["content"]) for i in first
        ]
        return [self._prepared[i]["input_ids"][0].tolist() for i in of], None, {}

    def _prepare(self, prompt):
        (ids,), _, fields = super()._tokenize_prompts([prompt])
        return dict(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            **{
                name: x if isinstance(x, torch.Tensor) else torch.as_tensor(np.array(x))
                for name, x in fields.items()
            },
        )

    def _collate(self, which: torch.Tensor) -> dict[str, torch.Tensor]:
        prompts = [self._prepared[i] for i in which.tolist()]
        return collate(prompts, self._tokenizer.pad_token_id, self.accelerator.device)

    def _generate_single_turn(
        self, prompt_ids: list, images: Any, fields: dict, num_generations: int, **kw: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        if not self.share:
            return self._generate_by_trl(prompt_ids, images, fields, num_generations, **kw)
        self._note_kept("rollout='merged'")
        which, group = by_prompt(self._of)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            merged(model, self._kept, self._precision()) as policy,
            torch.no_grad(),
            self.accelerator.autocast(),
            self._images_of(which),
        ):
            inputs = self._collate(which)
            read, positions = read_prompts(policy, policy, inputs)
            self._keep_positions(which, positions)
            if not room_for(read):
                raise NotImplementedError(
                    f"rollout='merged': {type(policy).__name__} keeps more than keys and values of its tokens; expected "
                    f"rollout='transformers' with it"
                )
            new, lengths, logps = self._sampler(
                policy, read, inputs, positions, group, self.max_completion_length
            )
        return tuple([row[:n] for row, n in zip(x.tolist(), lengths.tolist())] for x in (new, logps))

    def _images_of(self, which: torch.Tensor) -> AbstractContextManager:
        "Inside, the vision tower is given the images of the prompts `which`."
        return self._once.coming_from([(i, j) for i in which.tolist() for j in range(self._images[i])])

    def _keep_positions(self, which: torch.Tensor, positions: torch.Tensor) -> None:
        "Note the positions of the prompts' tokens, which a model derives from its images, with the prompts."
        for row, i in enumerate(which.tolist()):
            own = self._prepared[i]
            own["position_ids"] = positions[..., row : row + 1, -own["input_ids"].shape[1] :].cpu()

    def _generate_by_trl(self, *args, **kw):
        """TRL's own generation; log-probabilities come from vLLM, or are read off the logits while
        transformers generates."""
        if not self.use_vllm:
            with _reading(self._base(self.model), self.temperature) as logps_of:
                tokens, _ = super()._generate_single_turn(*args, **kw)
            return tokens, logps_of(tokens)
        self._note_kept(
            f"rollout='vllm_{self.vllm_mode}' (TRL adds the adapter to the weights that it sends to vLLM)"
        )
        layers = {} if self._spread else adapted_layers(self.model)
        keep(layers, self._kept)
        try:
            return super()._generate_single_turn(*args, **kw)
        finally:
            restore(
                layers, self._kept
            )  # TRL takes the adapter off again, which leaves rounding behind at every step

    def _base(self, model):
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _note_kept(self, road: str) -> None:
        """Log how much of the adapter is in what samples; say, once for each road that is taken, which it
        is and why."""
        if self._spread:
            return
        apart = self.share and stays_beside(self.model, self._precision())
        share, held = 1.0 if apart else merged_share(self.model), self._held()
        self._metrics["train" if self.model.training else "eval"]["policy/kept"].append(share)
        if apart in self._told:
            return
        self._told.add(apart)
        if apart:
            line = f"the adapter stays beside the {held} weights"
            if held == "float32":
                line += f", which are rounded to {self._precision()} in every product"
        else:
            line = f"the adapter is added to the {held} weights, which keep {share:.3f} of it"
        if not apart and share < KEPT:
            line += (
                f"; expected {KEPT} or more: what is sampled is not what is trained; take rollout='merged', or "
                f"policy_weights='float32'"
            )
        self._say(f"{road}: {line}")

    def _held(self) -> str:
        "What the frozen weights are held in."
        return str(self._base(self.model).dtype).removeprefix("torch.")

    def _compute_loss(self, model, inputs):
        self._scored = None
        if self.model.training and self._noise is None:
            self._noise = self._noise_of(model, inputs)
        loss = super()._compute_loss(model, inputs)
        sampled, scored = (
            inputs.get("sampling_per_token_logps"),
            inputs.get("old_per_token_logps", self._scored),
        )
        if self.model.training and sampled is not None and scored is not None:
            self._note_gap(self._mean_gap(sampled, scored, inputs["completion_mask"]))
        return loss

    def _note_gap(self, gap):
        self._noise = gap if self._noise is None else self._noise
        self._metrics["train"]["policy/gap"].append(gap)
        line = gap_alarm(gap, self._noise, self._precision())
        if not line or "gap" in self._told:
            return
        self._told.add("gap")
        if self.is_world_process_zero():
            tqdm.write(f"alarm at update {self.state.global_step + 1}: {line}")

    def _precision(self):
        "What the policy computes in."
        if self._computes_in is None:
            mixed = dict(bf16=torch.bfloat16, fp16=torch.float16).get(self.accelerator.mixed_precision)
            self._computes_in = mixed or self._base(self.model).dtype
        return self._computes_in

    @torch.no_grad()
    def _noise_of(self, model, inputs):
        """The gap of the same policy without its adapter on the tokens of the batch `inputs`, token by
        token against all at once: the rounding of its arithmetic.

        0 in float32; None where weights are spread over processes or there is no adapter: the first gap
        stands for it."""
        if self._precision() == torch.float32:
            return 0.0
        if self._spread or not isinstance(self.accelerator.unwrap_model(model), PeftModel):
            return None
        ids, mask, base = inputs["completion_ids"], inputs["completion_mask"], self._base(model)
        if not can_pack(base):
            return None
        with (
            self.accelerator.unwrap_model(model).disable_adapter(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.accelerator.autocast(),
        ):
            prompts, group = self._prompts_of(inputs)
            read, positions = read_prompts(base, base, prompts)
            sampler = Sampler([], self._tokenizer.pad_token_id, self.temperature)
            apart = sampler(base, read, prompts, positions, group, ids.shape[1], given=ids)[2]
            if self.share:
                at_once = self._score(model, ids, mask, inputs["pixel_values"][:, 0])[0]
            else:
                fields = {n: inputs.get(n) for n in (*IMAGE_FIELDS, *BY_TOKEN[2:])}
                both = [torch.cat([inputs[f"prompt_{n}"], x], 1) for n, x in (("ids", ids), ("mask", mask))]
                at_once = self._get_per_token_logps_and_entropies(model, *both, ids.shape[1], **fields)[0]
        return self._mean_gap(apart, at_once, mask)

    def _mean_gap(self, *logps_and_mask):
        return self.accelerator.gather(mean_gap(*logps_and_mask)).nanmean().item()

    def _prompts_of(self, inputs: dict) -> tuple[dict[str, torch.Tensor], int]:
        "Model inputs of the prompts of the batch `inputs`, and how many candidates answer each, in order."
        if self.share:
            which, group = by_prompt(inputs["pixel_values"][:, 0])
            return {n: x for n, x in self._collate(which).items() if n != "position_ids"}, group
        P = inputs["prompt_ids"].shape[1]
        read = dict(input_ids=inputs["prompt_ids"], attention_mask=inputs["prompt_mask"])
        read |= {n: inputs[n][:, :P] for n in BY_TOKEN[2:] if n in inputs}
        return read | {n: inputs[n] for n in IMAGE_FIELDS if n in inputs and n != "num_images"}, 1

    def _generate_and_score_completions(self, inputs):
        if not self.share:
            return super()._generate_and_score_completions(inputs)
        self.processing_class = _HasRun(self)
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.processing_class = self._processor

    def _get_per_token_logps_and_entropies(self, *args, **kw):
        logps = self._logps_by_prompt if self.share else super()._get_per_token_logps_and_entropies
        out = logps(*args, **kw)
        if torch.is_grad_enabled():
            self._scored = out[0].detach()
        return out

    def _logps_by_prompt(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        pixel_values: torch.Tensor | None = None,
        **kw: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        "As TRL's method, each prompt read once; `pixel_values` `(N, 1)`: which prompt a candidate answers."
        n, T = batch_size or len(input_ids), logits_to_keep
        parts = [
            self._score(
                model, input_ids[i : i + n, -T:], attention_mask[i : i + n, -T:], pixel_values[i : i + n, 0]
            )
            for i in range(0, len(input_ids), n)
        ]
        logps, entropies = zip(*parts)
        return torch.cat(logps), None if entropies[0] is None else torch.cat(entropies), None

    def _score(
        self, model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, prompts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and entropies, both `(N, T)`, of the candidates `ids` to the prompts numbered
        `prompts` `(N,)`."""
        which, _ = by_prompt(prompts)
        with self.accelerator.autocast(), self._images_of(which):
            return score_packed(model, self._with_positions(which), ids, mask)

    def _with_positions(self, which: torch.Tensor) -> dict[str, torch.Tensor]:
        "Model inputs of the prompts `which`; those whose tokens' positions no rollout has noted are read for them."
        unknown = [i for i in which.tolist() if "position_ids" not in self._prepared[i]]
        if unknown:
            base, unknown = self._base(self.model), torch.tensor(unknown)
            with torch.no_grad(), self._images_of(unknown):
                self._keep_positions(unknown, read_prompts(base, base, self._collate(unknown))[1])
        return self._collate(which)


class _HasRun:
    """Stands for the processor where TRL runs it again on what it has just run it on: in place of pixels
    every candidate carries the number of its prompt."""

    def __init__(self, trainer):
        self._trainer = trainer

    def __getattr__(self, name):
        return getattr(self._trainer._processor, name)

    def __call__(self, images, text, **kw):
        return dict(pixel_values=self._trainer._of[:, None])
