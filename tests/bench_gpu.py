"""Seconds, tokens and memory of an alignment step of a 7B LLaVA on a GPU, beside TRL's GRPOTrainer.

python tests/bench_gpu.py --out DIR             # LLaVA 7B from its configuration, random weights, bfloat16;
                                                # 8 prompts x G = 8, 576 image and 256 new tokens, LoRA r = 64
python tests/bench_gpu.py --out DIR --tiny      # a miniature on the CPU, under a minute: that the script runs

The systems take turns on one model, so that only one policy is in memory. Every step has every reward
(text, labels and entities) with the embedded scorers; two systems have "reward models" instead, CheXbert and
RadGraph of the true size with random weights, once after the reference and once beside it
(`overlap_rewards`). "rewards" are the seconds that a step waits for them, "beside" those in which they run
while the reference is scored. The first step of a system is not counted. Beside the systems stands the limit
that the device's own bandwidth and arithmetic, measured first, leave (`valor.train.memory.step_limit`).

RadGraph alone is measured against its package, which reads every candidate with its reference as its own
reward does: on a batch of texts that ours has not seen, as in an epoch's first steps, and on the same batch
again.
Writes DIR/bench_gpu.json and a table, DIR/bench_gpu.md."""

import argparse
import copy
import gc
import json
import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from bench_rewards import batch
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
from valor.rewards.chexbert import LabelF1
from valor.rewards.compose import CLINICAL_SCORERS, TEXT_SCORERS
from valor.rewards.radgraph import EntityF1, load_radgraph, radgraph_folder, shims
from valor.rewards.text import scorer
from valor.testing import miniature_chexbert, miniature_radgraph
from valor.train import grpo
from valor.train.memory import llava_med_7b, memory, shape_of

REPORT = "<report> the heart is large . no effusion or edema seen . </report>"
GPU = torch.cuda.is_available()


def policy(tiny: bool) -> tuple:
    "`(model, processor)` with random weights: the true configuration, or a miniature."
    torch.manual_seed(0)
    if tiny:
        with tempfile.TemporaryDirectory() as folder:
            save_policy(*build_policy([REPORT], image_size=32, width=32), folder)
            return load_policy(folder)
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
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.suppress_tokens = [config.image_token_index]
    return model, processor


def now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    "Seconds by part, one dict a step. `step` is from its begin, rollout included, to its end."

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kw):
        self.steps.append(dict(rollout=0.0, rewards=0.0, batch=0.0, tokens=0, start=now()))

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


def timed(trainer) -> dict:
    "Means over the steps of `trainer` but the first, the peak of memory, what the log says of the policy."
    clock = Clock()
    clock.around(trainer, "_generate", "rollout", count=lambda out: sum(map(len, out[1])))
    clock.around(trainer, "_calculate_rewards", "rewards")
    clock.around(trainer, "_generate_and_score_completions", "batch")
    trainer.add_callback(clock)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    kept = clock.steps[1:] or clock.steps
    mean = {
        k: float(np.mean([s[k] for s in kept])) for k in ("rollout", "rewards", "batch", "step", "tokens")
    }
    log = [row for row in trainer.state.log_history if "policy/gap" in row]
    beside = [row["time/overlap"] for row in trainer.state.log_history if "time/overlap" in row]
    return mean | {
        "overlap": float(np.mean(beside[1:] or beside)) if beside else None,
        "reference": mean["batch"] - mean["rollout"] - mean["rewards"],
        "update": mean["step"] - mean["batch"],
        "ms a token": 1e3 * mean["rollout"] / trainer.args.max_completion_length,
        "tokens/s": mean["tokens"] / mean["step"],
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if GPU else None,
        "gap": [row["policy/gap"] for row in log] or None,
        "kept": [row["policy/kept"] for row in log if "policy/kept" in row] or None,
        "parts": trainer.args.gradient_accumulation_steps,
        "checkpointing": trainer.args.gradient_checkpointing,
    }


def made_up_models(a) -> Path:
    "The folder of reward models with random weights, of the true size or, for `--tiny`, small."
    folder, size = a.out / "rewards", (64, 2) if a.tiny else (768, 12)
    if not folder.exists():
        folder.mkdir()
        miniature_chexbert(folder, *size)
        miniature_radgraph(folder, "radgraph-xl", *size)
    return folder


def scorers_of(a, models: bool) -> dict:
    "{name: scorer} of all rewards: the embedded ones or, with `models`, `made_up_models`."
    names = (*TEXT_SCORERS, *CLINICAL_SCORERS, "format")
    embedded = {name: scorer(name) for name in names}
    if not models:
        return embedded
    folder = made_up_models(a)
    real = dict(chexbert=LabelF1(folder), radgraph=EntityF1(folder / "radgraph-xl"))
    return {name: real.get(name, embedded[name]) for name in names}


def valor_trainer(
    a, model, processor, steps, prompts=None, parts=None, checkpointing=None, models=False, **changes
):
    "Our trainer on `model`, as `valor train` makes it. `models`: see `scorers_of`."
    prompts, parts = prompts or a.prompts, parts or a.parts
    cfg = preset(
        "smoke",
        sft_mode="lora",
        sft_batch_size=parts,
        batch_size=prompts,
        group_size=a.group,
        max_new_tokens=a.new,
        lora_r=a.rank,
        lora_alpha=2 * a.rank,
        k_clin=1,
        lambda_vis=0.0,
        lr=1e-6,
        policy_weights="bfloat16" if GPU else "float32",
        gradient_accumulation_steps=parts,
        gradient_checkpointing=checkpointing or a.checkpointing,
        save_steps=10_000,
        keep_completions=False,
        **changes,
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
    rewards = grpo.Rewards(scorers_of(a, models), cfg.k_clin)
    grpo.load_policy = lambda *args, **kw: (model, processor)
    shutil.rmtree(a.out / "run", ignore_errors=True)
    stage = grpo.Stage("language", 0.0, steps, seed=0)
    trainer = grpo.make_trainer("", data, a.out / "run", rewards, cfg, stage)
    trainer.args.logging_steps = 1
    return trainer


def trl_trainer(a, model, processor, steps, **changes):
    "TRL's own trainer with the arguments, data and rewards of ours."
    ours = valor_trainer(a, model, processor, steps, rollout="transformers", checkpointing="on")
    args, rewards, data = copy.deepcopy(ours.args), ours.rewards, ours.train_dataset
    if changes.get("vllm"):
        args.use_vllm, args.vllm_mode, args.vllm_gpu_memory_utilization = True, "colocate", 0.3
    del ours
    fresh(model)
    theirs = GRPOTrainer(
        model,
        reward_funcs=rewards.functions(),
        args=args,
        train_dataset=data,
        processing_class=processor,
        peft_config=lora_config(model, "language", a.rank, 2 * a.rank),
    )
    theirs.remove_callback(PrinterCallback)
    rewards.k = 1  # every reward on every step
    return theirs


def fresh(model) -> None:
    "Take a trainer's adapter and patches off `model` again."
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            base.weight.data = base.weight.data.contiguous()
            model.set_submodule(name, base)
    vars(model).pop("forward", None)
    vars(model).pop("peft_config", None)
    model._hf_peft_config_loaded = False
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    if hasattr(model, "disable_input_require_grads") and hasattr(model, "_require_grads_hooks"):
        model.disable_input_require_grads()
    for config in (model.config, model.config.get_text_config()):
        config._attn_implementation = "sdpa"


def measured(a, make, model, processor, steps, **changes) -> dict | None:
    "The figures of one system; None where it does not fit."
    fresh(model)
    try:
        return timed(make(a, model, processor, steps, **changes))
    except torch.OutOfMemoryError as e:
        print("out of memory:", str(e)[:200], flush=True)
        return None
    finally:
        grpo.load_policy = None
        fresh(model)
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()


def radgraph_seconds(a) -> dict:
    "Seconds of RadGraph for a batch: the package's, ours on texts that are new, and ours on the same again."
    folder = made_up_models(a) / "radgraph-xl"
    package = load_radgraph(radgraph_folder(folder, "radgraph-xl"), "radgraph-xl")
    device = "cuda" if GPU else "cpu"
    package.device = torch.device(device)
    package.model.to(device)
    judge, found = EntityF1(folder, device=device), {}

    def seconds(job) -> float:
        start = now()
        job()
        return now() - start

    with shims(), torch.no_grad():
        for seed in (1, 0):  # the first batch, whose texts do not come again, makes kernels ready
            candidates, references = batch(a.prompts, a.group, 0.3, seed)
            found["package"] = seconds(lambda: package(candidates + references))
            found["first epoch"] = seconds(lambda: judge.score(candidates, references))
            found["later epochs"] = seconds(lambda: judge.score(candidates, references))
    return found


def radgraph_lines(found: dict) -> list[str]:
    "The table of RadGraph's seconds."
    package = found["package"]
    lines = ["", "| RadGraph | seconds | times faster |", "|---|---|---|"]
    return lines + [f"| {name} | {s:.3f} | {package / s:.1f} |" for name, s in found.items()]


def device_limits() -> dict:
    "What the device does: bytes a second of a copy (read and write), FLOP a second of a bfloat16 product."
    big = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    to, x = torch.empty_like(big), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def seconds(job, n=10):
        job()
        start = now()
        for _ in range(n):
            job()
        return (now() - start) / n

    return dict(
        bandwidth=2 * big.numel() / seconds(lambda: to.copy_(big)), flops=2 * 8192**3 / seconds(lambda: x @ x)
    )


def rows_of(a, found: dict) -> list[str]:
    "The table of the systems, one line each."
    columns = "step (s), rollout, ms a token, rewards, beside, reference, update, tokens/s, peak GB"
    columns = columns.split(", ")
    lines = ["| system | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, r in found["systems"].items():
        if r is None:
            lines.append(f"| {name} | does not fit | | | | | | | | |")
            continue
        peak = "–" if r["peak GB"] is None else f"{r['peak GB']:.1f}"
        beside = "–" if r["overlap"] is None else f"{r['overlap']:.2f}"
        lines.append(
            f"| {name} | {r['step']:.2f} | {r['rollout']:.2f} | {r['ms a token']:.1f} | {r['rewards']:.2f} | "
            f"{beside} | {r['reference']:.2f} | {r['update']:.2f} | {r['tokens/s']:.0f} | {peak} |"
        )
    if found["limit"]:
        r = found["limit"]
        a_token = 1e3 * r["rollout"] / a.new
        lines.append(
            f"| limit (computed) | {r['step']:.2f} | {r['rollout']:.2f} | {a_token:.1f} | | | "
            f"{r['reference']:.2f} | {r['update']:.2f} | | |"
        )
    return lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--tiny", action="store_true")
    for name, value in dict(prompts=8, group=8, new=256, rank=64, parts=8, steps=3).items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--checkpointing", default="off", choices=("on", "off"))
    p.add_argument("--only", nargs="*", default=None, help="names of the systems to measure, or RadGraph")
    p.add_argument("--small", action="store_true", help="also a 24 GB card, by limiting torch's memory")
    a = p.parse_args()
    if a.tiny:
        a.prompts, a.group, a.new, a.rank, a.steps, a.parts = 2, 4, 8, 4, 1, 2
    elif not GPU:
        p.error("no GPU here: not measured; --tiny tries the script on the CPU")
    a.out.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.cuda.get_device_name() if GPU else "CPU"
    limits = device_limits() if GPU else None
    model, processor = policy(a.tiny)
    systems = {
        "valor": (valor_trainer, dict(steps=a.steps + 1, overlap_rewards="off")),
        "valor, checkpointing": (valor_trainer, dict(steps=a.steps + 1, checkpointing="on", parts=2)),
        "valor, reward models": (
            valor_trainer,
            dict(steps=a.steps + 1, models=True, overlap_rewards="off"),
        ),
        "valor, reward models beside the reference": (
            valor_trainer,
            dict(steps=a.steps + 1, models=True, overlap_rewards="on"),
        ),
        "TRL": (trl_trainer, dict(steps=2)),
    }
    if find_spec("vllm"):
        systems["TRL with vLLM"] = (trl_trainer, dict(steps=2, vllm=True))
    if a.small or a.tiny:
        half = max(1, a.prompts // 2)
        settings = dict(steps=2, checkpointing="on", prompts=half, parts=half)
        systems[f"valor, 24 GB, {half} × {a.group}"] = (valor_trainer, settings)
    found = dict(
        device=device,
        versions=dict(torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__),
        settings={k: v for k, v in vars(a).items() if k not in ("out", "only")},
        device_limits=limits,
        limit=None,
        systems={},
    )
    if not a.tiny:
        from valor.train.memory import step_limit

        found["limit"] = step_limit(
            shape_of(llava_med_7b()), a.prompts, a.group, new=a.new, r=a.rank, **limits
        )
        found["computed"] = memory(
            shape_of(llava_med_7b()), r=a.rank, prompts=a.prompts, group=a.group, parts=a.parts,
            checkpointing=a.checkpointing == "on", new=a.new,
        )  # fmt: skip
    for name, (make, settings) in systems.items():
        if a.only and name not in a.only:
            continue
        if GPU and "24 GB" in name:
            torch.cuda.set_per_process_memory_fraction(
                24e9 / torch.cuda.get_device_properties(0).total_memory
            )
        found["systems"][name] = measured(a, make, model, processor, **settings)
        print(name, json.dumps(found["systems"][name]), flush=True)
        if GPU and "24 GB" in name:
            torch.cuda.set_per_process_memory_fraction(1.0)
        (a.out / "bench_gpu.json").write_text(json.dumps(found, indent=1))
    if not a.only or "RadGraph" in a.only:
        found["radgraph"] = radgraph_seconds(a)
        (a.out / "bench_gpu.json").write_text(json.dumps(found, indent=1))
    what = (
        "A miniature on the CPU, not measured on a GPU"
        if a.tiny
        else f"LLaVA 7B, {device}, {a.prompts} × {a.group}, {a.new} new tokens, LoRA r = {a.rank}"
    )
    lines = [what, "", *rows_of(a, found)]
    lines += radgraph_lines(found["radgraph"]) if "radgraph" in found else []
    (a.out / "bench_gpu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    for folder in ("run", "rewards"):
        shutil.rmtree(a.out / folder, ignore_errors=True)


if __name__ == "__main__":
    main()
