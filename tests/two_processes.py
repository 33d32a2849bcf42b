"""Updates of a miniature stage 2 on completions that were sampled once, however they are shared out.

Imported by test_two_processes.py, which also runs it on two processes: then what each process saw is
written to its folder."""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import TrainerCallback

from valor.config import preset
from valor.rewards.compose import CLINICAL_SCORERS, TEXT_SCORERS
from valor.train.grpo import Rewards, Stage, make_trainer

WORDS, START = "<report> the heart is large. no effusion or edema seen. </report>", 5
IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32), dtype=np.uint8)) for i in range(8)
]


class Share:
    def __init__(self, word, calls):
        self.word, self.calls = word, calls

    def score(self, candidates, references):
        self.calls.append(self.word)
        return [c.split().count(self.word) / max(1, len(c.split())) for c in candidates]


class Gradients(TrainerCallback):
    "The gradient of every update, as the optimiser is about to use it."

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kw):
        self.seen.append(
            torch.cat(
                [whole(p.grad).flatten() for _, p in sorted(model.named_parameters()) if p.requires_grad]
            )
        )


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def trained(out, sft, processes=1, parts=1, taken=None, resume=None, **change):
    """Three updates, each process computing its share in `parts`. `taken`: {k: token lists} to replay;
    None: sample. Returns what this process saw, as a dict."""
    calls, data = (
        [],
        Dataset.from_dict(
            dict(image=IMAGES, report=[WORDS] * 8),
            features=Features(image=ImageFeature(), report=Value("string")),
        ),
    )
    cfg = preset(
        "smoke",
        group_size=4,
        batch_size=1,
        max_new_tokens=8,
        k_clin=2,
        stage2_steps=3,
        gradient_accumulation_steps=parts,
        **(dict(rank_norm="unit", rollout="transformers") | change),
    )
    scorers = {
        n: Share(w, calls)
        for n, w in zip(
            (*TEXT_SCORERS, *CLINICAL_SCORERS, "format"), "the heart is effusion edema seen".split()
        )
    }
    rewards = Rewards(scorers, cfg.k_clin, similarity=lambda texts, rows: [float(len(t)) for t in texts])
    calls.clear()  # the trial before training
    trainer = make_trainer(
        sft,
        data,
        out,
        rewards,
        cfg,
        Stage("language+projector", 0.5, cfg.stage2_steps, seed=0, k_start=START),
        per_device=4 // processes,
    )
    trainer.add_callback(gradients := Gradients())
    sampled, seen, rank = {}, [], trainer.accelerator.process_index
    sample, score = trainer._generate_single_turn, trainer._generate_and_score_completions

    def turn(prompt_ids, *more, **kw):
        if taken is None:
            ids, logps = sample(prompt_ids, *more, **kw)
        else:
            ids, logps = taken[str(trainer.k + 1)][rank * len(prompt_ids) :][: len(prompt_ids)], None
        sampled[str(trainer.k + 1)] = ids
        return ids, logps

    def spy(inputs):
        output = score(inputs)
        seen.append(
            dict(
                k=trainer.k,
                scores=torch.nan_to_num(trainer.scores, nan=-1.0).tolist(),
                advantages=output["advantages"].tolist(),
            )
        )
        return output

    trainer._generate_single_turn, trainer._generate_and_score_completions = turn, spy
    trainer.train(resume_from_checkpoint=resume)
    weights = torch.cat(
        [whole(p).flatten() for _, p in sorted(trainer.model.named_parameters()) if p.requires_grad]
    )
    sharded = {
        type(m).__name__ for m in trainer.model.modules() if type(m).__name__.startswith("FSDP")
    }  # classes of what is sharded one by one
    trainer.save_model(str(Path(out) / "adapter"))
    return dict(
        sharded=sorted(sharded),
        seen=seen,
        clinical_calls=sum(w in ("effusion", "edema") for w in calls),
        sampled=sampled,
        gradients=torch.stack(gradients.seen),
        weights=weights,
        losses=[l["loss"] for l in trainer.state.log_history if "loss" in l],
    )


def shard_on_cpu():
    """accelerate turns FSDP on for GPUs only; FSDP2 itself runs on CPU processes as well. Let accelerate
    take these for GPUs."""
    first = PartialState.__init__

    def init(self, *args, **kw):
        first(self, *args, **kw)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def main(out, how):
    out, sft = Path(out), str(Path(out) / "sft")
    taken = json.loads((out / "taken.json").read_text())
    if how == "fsdp":
        shard_on_cpu()
    saw = {
        parts: trained(out / f"{how}{parts}", sft, 2, parts, taken)
        for parts in ((1,) if how == "fsdp" else (1, 2))
    }
    if how == "ddp":
        saw |= {
            "merged": trained(out / "merged", sft, 2, 2, taken, rollout="merged", overlap_rewards="on"),
            "sampled": trained(out / "sampled", sft, 2, rollout="merged"),
        }
    torch.save(saw, out / f"{how} rank{torch.distributed.get_rank()}.pt")
