"""Speed and memory of one alignment step of a 7B LLaVA on a GPU, beside TRL's GRPOTrainer untouched at
the same settings, in one run.

python tests/bench_gpu.py --out DIR             # LLaVA 7B from its configuration, random weights,
bfloat16; 8 prompts x G = 8, 576 image and 256 new tokens, LoRA r = 64 python tests/bench_gpu.py --out DIR
--tiny      # a miniature on the CPU, under a minute: that the script runs

Writes DIR/bench_gpu.json and one line of markdown, DIR/bench_gpu.md. Rewards are the text rewards with
the embedded scorers; the first step of each system is not counted. The policy, about 15 GB, is written to
DIR/policy and removed at the end."""

import argparse
import copy
import gc
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PrinterCallback,
    TrainerCallback,
)
from trl import GRPOTrainer

from valor.config import preset
from valor.policy.models import load_policy, lora_config, save_policy
from valor.policy.tiny import TEMPLATE, build_policy, build_tokenizer
from valor.rewards.compose import CLINICAL_SCORERS, TEXT_SCORERS
from valor.rewards.text import scorer
from valor.train.grpo import Rewards, Stage, make_trainer
from valor.train.memory import llava_med_7b, memory, shape_of

REPORT = "<report> the heart is large . no effusion or edema seen . </report>"
GPU = torch.cuda.is_available()


def policy(tiny):
    "`(model, processor)` with random weights: the true configuration, or a miniature."
    if tiny:
        return build_policy([REPORT], image_size=32, width=32)
    config, tokenizer = llava_med_7b(), build_tokenizer([REPORT])
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    images = CLIPImageProcessor(size={"height": 336, "width": 336}, do_center_crop=False)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlavaForConditionalGeneration(config), processor
    finally:
        torch.set_default_dtype(torch.float32)


def now():
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    "Seconds by part, one dict a step. `step` is from its begin, rollout included, to its end."

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kw):
        self.steps.append(dict(rollout=0.0, rewards=0.0, tokens=0, start=now()))

    def on_step_end(self, args, state, control, **kw):
        self.steps[-1]["step"] = now() - self.steps[-1].pop("start")

    def around(self, trainer, method, part, count=None):
        inner = getattr(trainer, method)

        def timed(*args, **kw):
            start = now()
            out = inner(*args, **kw)
            self.steps[-1][part] += now() - start
            if count:
                self.steps[-1]["tokens"] += count(out)
            return out

        setattr(trainer, method, timed)


def timed(trainer):
    "Means over the steps of `trainer` but the first, and the peak of memory."
    clock = Clock()
    clock.around(trainer, "_generate", "rollout", count=lambda out: sum(map(len, out[1])))
    clock.around(trainer, "_calculate_rewards", "rewards")
    trainer.add_callback(clock)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    kept = clock.steps[1:] or clock.steps
    mean = {k: float(np.mean([s[k] for s in kept])) for k in ("rollout", "rewards", "step", "tokens")}
    return mean | {
        "update": mean["step"] - mean["rollout"] - mean["rewards"],
        "tokens/s": mean["tokens"] / mean["step"],
        "rollout tokens/s": mean["tokens"] / mean["rollout"],
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if GPU else None,
    }


def valor_trainer(a, out, prompts, steps):
    cfg = preset(
        "smoke",
        sft_mode="lora",
        sft_batch_size=a.parts,
        batch_size=prompts,
        group_size=a.group,
        max_new_tokens=a.new,
        lora_r=a.rank,
        lora_alpha=2 * a.rank,
        k_clin=1,
        lambda_vis=0.0,
        policy_weights="bfloat16" if GPU else "float32",
        gradient_accumulation_steps=a.parts,
        gradient_checkpointing=a.checkpointing,
        save_steps=10_000,
    )
    size = 32 if a.tiny else 336
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (size, size, 3), dtype=np.uint8))
        for i in range(prompts)
    ]
    data = Dataset.from_dict(
        dict(image=images, report=[REPORT] * prompts),
        features=Features(image=ImageFeature(), report=Value("string")),
    )
    rewards = Rewards({n: scorer(n) for n in (*TEXT_SCORERS, *CLINICAL_SCORERS, "format")}, cfg.k_clin)
    shutil.rmtree(out, ignore_errors=True)
    stage = Stage("language", 0.0, steps, seed=0)
    return make_trainer(a.out / "policy", data, out, rewards, cfg, stage)


def trl_trainer(a, out, prompts, steps):
    "TRL's own trainer with the arguments, data and rewards of ours."
    ours = valor_trainer(a, out, prompts, steps)
    model, processor = load_policy(a.out / "policy", dtype=torch.bfloat16 if GPU else torch.float32)
    theirs = GRPOTrainer(
        model,
        reward_funcs=ours.rewards.functions(),
        args=copy.deepcopy(ours.args),
        train_dataset=ours.train_dataset,
        processing_class=processor,
        peft_config=lora_config(model, "language", a.rank, 2 * a.rank),
    )
    theirs.remove_callback(PrinterCallback)
    ours.rewards.k = ours.cfg.k_clin  # every reward on every step
    return theirs


def freed(job):
    "What `job()` gives, its memory given back; None where it does not fit."
    try:
        return job()
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--tiny", action="store_true")
    for name, value in dict(prompts=8, group=8, new=256, rank=64, parts=1, steps=3, most=256).items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--checkpointing", default="on", choices=("on", "off"))
    a = p.parse_args()
    if a.tiny:
        a.prompts, a.group, a.new, a.rank, a.steps, a.most = 1, 4, 8, 4, 1, 2
    elif not GPU:
        p.error("no GPU here: not measured; --tiny tries the script on the CPU")
    a.out.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    save_policy(*policy(a.tiny), a.out / "policy")
    if GPU:
        torch.cuda.empty_cache()
    make = dict(valor=valor_trainer, TRL=trl_trainer)
    systems = {
        name: freed(lambda: timed(make[name](a, a.out / name, a.prompts, a.steps + 1))) for name in make
    }
    largest, prompts = None, a.prompts
    while prompts <= a.most and (
        found := freed(lambda: timed(valor_trainer(a, a.out / "largest", prompts, 1)))
    ):
        largest, prompts = dict(prompts=prompts, **found), 2 * prompts
    device = torch.cuda.get_device_name() if GPU else "CPU"
    computed = (
        None
        if a.tiny
        else memory(
            shape_of(llava_med_7b()),
            r=a.rank,
            sequences=a.prompts * a.group,
            parts=a.parts,
            checkpointing=a.checkpointing == "on",
            new=a.new,
        )
    )
    found = dict(
        device=device,
        versions=dict(torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__),
        settings={k: v for k, v in vars(a).items() if k != "out"},
        systems=systems,
        computed=computed,
    ) | {"largest batch": largest}
    (a.out / "bench_gpu.json").write_text(json.dumps(found, indent=1))

    def cells(r):
        return (
            "does not fit"
            if r is None
            else f"{r['step']:.2f} s ({r['rollout']:.2f} rollout, {r['rewards']:.2f} rewards, "
            f"{r['update']:.2f} update), {r['tokens/s']:.0f} tokens/s"
            + (f", {r['peak GB']:.1f} GB" if r["peak GB"] else "")
        )

    what = (
        "a miniature on the CPU, not measured on a GPU"
        if a.tiny
        else f"LLaVA 7B, {device}, {a.prompts} × {a.group}, {a.new} new tokens, LoRA r = {a.rank}"
    )
    line = (
        f"| {what} | "
        + " | ".join(f"{name}: {cells(r)}" for name, r in systems.items())
        + f" | largest batch tried that fits: {largest and largest['prompts']} prompts |"
    )
    (a.out / "bench_gpu.md").write_text(line + "\n")
    print(line)
    for name in ("policy", *make, "largest"):
        shutil.rmtree(a.out / name, ignore_errors=True)


if __name__ == "__main__":
    main()
