"""Seconds of a GRPO step of the embedded policy: an untouched TRL `GRPOTrainer` against rollout="merged",
in turn, one run, the same length of completions.

OMP_NUM_THREADS=1 python tests/bench_rollout.py [--threads 1] [--tokens 64] [--prompts 4] [--group 8]
[--steps 12] [--rewards [--packages]]

Times are processor seconds of this process (other work on the machine does not count), wall seconds
beside them. Without --rewards a step is timed with rewards that cost nothing; with it, with those of
preset `laptop` (BERTScore's encoder, the rules), the same for both; with --packages as well, TRL's
BERTScore is the package bert-score's, as one would plug it in."""

import argparse
import copy
import tempfile
import threading
import time

import pandas as pd
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from valor.config import preset
from valor.data.benchmarks import load_benchmark
from valor.policy.models import load_policy, lora_config, save_policy
from valor.policy.prompt import conversations
from valor.policy.tiny import build_policy
from valor.rewards.text import as_completion, minilm_folder, report_body
from valor.runs.makers import text_scorers
from valor.train.grpo import Rewards, Stage, make_trainer


class Free:
    def score(self, candidates, references):
        return [float(len(c)) for c in candidates]


def timed(cls):
    "`cls` with the processor and wall seconds of each training step and each of its parts in `spent`."

    def around(name, method):
        def run(self, *args, **kw):
            cpu, wall = time.process_time(), time.perf_counter()
            out = method(self, *args, **kw)
            self.spent[-1][name] = time.process_time() - cpu
            self.spent[-1][f"{name}, wall"] = time.perf_counter() - wall
            return out

        return run

    def training_step(self, *args, **kw):
        self.spent.append({})
        return around("step", cls.training_step)(self, *args, **kw)

    return type(
        cls.__name__,
        (cls,),
        dict(
            spent=[],
            training_step=training_step,
            **{
                m: around(n, getattr(cls, m))
                for m, n in (
                    ("_generate", "rollout"),
                    ("_calculate_rewards", "rewards"),
                    ("_generate_and_score_completions", "before the update"),
                )
            },
        ),
    )


class Package:
    "BERTScore by the package, with the encoder and layer of preset `laptop`."

    def __init__(self):
        import bert_score

        self.scorer = bert_score.BERTScorer(model_type=minilm_folder(), num_layers=6)

    def score(self, candidates, references):
        return self.scorer.score(
            [report_body(c) or "." for c in candidates], [report_body(r) for r in references]
        )[2].tolist()


class Turns(TrainerCallback):
    "Two trainers, each in its thread, step by step in turn: what else the machine does meets both alike."

    def __init__(self, mine, other):
        self.mine, self.other = mine, other

    def on_step_begin(self, args, state, control, **kw):
        self.mine.acquire()

    def on_step_end(self, args, state, control, **kw):
        self.other.release()


def main():
    p = argparse.ArgumentParser()
    for name, value in dict(threads=1, tokens=64, steps=12, group=8, prompts=4).items():
        p.add_argument(f"--{name}", type=int, default=value)
    for name in ("rewards", "packages"):
        p.add_argument(f"--{name}", action="store_true")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    # hardly anything is learned, so that both go on writing reports of one kind; a smaller lr would be lost
    # in float32 weights, and the adapter would stay beside them
    size = dict(lr=1e-6, max_new_tokens=args.tokens, group_size=args.group, batch_size=args.prompts)
    cfg = preset("laptop", threads=args.threads, **size)
    data = load_benchmark("phantom", 200, 8, 16, seed=0, size=96, sections="both")["train"]
    work = tempfile.mkdtemp()
    save_policy(*build_policy([as_completion(r) for r in data["report"]], 96), f"{work}/sft")
    scorers = text_scorers(cfg) if args.rewards else {n: Free() for n in text_scorers(cfg)}
    rewards = Rewards(scorers, None, similarity=lambda texts, rows: [float(len(t)) for t in texts])
    naive = (
        Rewards(scorers | dict(bertscore=Package()), None, similarity=rewards.row_functions["similarity"])
        if args.packages
        else rewards
    )

    def make(name, rollout):
        return make_trainer(
            f"{work}/sft",
            data,
            f"{work}/{name}",
            rewards,
            preset("laptop", rollout=rollout, k_clin=None, **size),
            Stage("language", 0.5, args.steps, seed=0),
        )

    ours = make("ours", "merged")
    model, processor = load_policy(f"{work}/sft")
    theirs = timed(GRPOTrainer)(
        model,
        reward_funcs=naive.functions(),
        args=copy.deepcopy(ours.args),
        train_dataset=conversations(data),
        processing_class=processor,
        peft_config=lora_config(model, "language", cfg.lora_r, cfg.lora_alpha),
    )
    ours.__class__ = timed(type(ours))
    turn = threading.Semaphore(1), threading.Semaphore(0)
    both = {"TRL": theirs, "merged": ours}
    for trainer, mine, other in ((theirs, *turn), (ours, *turn[::-1])):
        # every report as long as it may be
        trainer.generation_config.eos_token_id = None
        trainer.model.get_base_model().generation_config.eos_token_id = None
        trainer.eos_token_ids = []
        trainer.add_callback(Turns(mine, other))
    threads = [threading.Thread(target=t.train) for t in both.values()]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    spent = {name: pd.DataFrame(t.spent).iloc[2:] for name, t in both.items()}
    for f in spent.values():
        for end in ("", ", wall"):
            f["update" + end] = f["step" + end] - f["before the update" + end]
            f["reference, scoring" + end] = (
                f["before the update" + end] - f["rollout" + end] - f["rewards" + end]
            )
    rows = [
        r + end
        for end in ("", ", wall")
        for r in ("rollout", "rewards", "reference, scoring", "update", "step")
        if args.rewards or r != "rewards"
    ]
    t = pd.DataFrame(
        {name: f.median() for name, f in spent.items()} | {"ratio": (spent["TRL"] / spent["merged"]).median()}
    ).loc[rows]
    print(
        f"{cfg.batch_size} prompts x {cfg.group_size}, {args.tokens} new tokens, {args.threads} threads, "
        f"medians of {args.steps - 2} pairs of steps, rewards "
        f"{'of laptop' if args.rewards else 'free'}{', by the package for TRL' if args.packages else ''}"
        f"\n{t.round(3).to_markdown()}"
    )


if __name__ == "__main__":
    main()
