"""Seconds of a GRPO step of the embedded policy: an untouched TRL `GRPOTrainer` against rollout="merged", in turn, one run, the same length of completions.

    OMP_NUM_THREADS=1 python tests/bench_rollout.py [--threads 1] [--tokens 64] [--steps 12] [--rewards]

Times are processor seconds of this process (other work on the machine does not count), wall seconds beside them. Without --rewards a
step is timed with rewards that cost nothing; with it, with those of preset `laptop` (BERTScore's encoder, the rules), the same for both."""
import argparse, copy, tempfile, time

import pandas as pd, torch
from trl import GRPOTrainer

from valor.config import preset
from valor.data import load_benchmark
from valor.experiment import target, text_scorers
from valor.grpo import Rewards, make_trainer
from valor.policy import build_policy, conversations, load_policy, lora_config, save_policy
from valor.rewards import scorer


class Free:
    def score(self, candidates, references): return [float(len(c)) for c in candidates]


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
    return type(cls.__name__, (cls,), dict(spent=[], training_step=training_step, **{m: around(n, getattr(cls, m)) for m, n in
                (("_generate", "rollout"), ("_calculate_rewards", "rewards"), ("_generate_and_score_completions", "before the update"))}))


def main():
    p = argparse.ArgumentParser()
    for name, value in dict(threads=1, tokens=64, steps=12).items(): p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--rewards", action="store_true")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    cfg = preset("laptop", max_new_tokens=args.tokens, threads=args.threads)
    data = load_benchmark("phantom", 200, 8, 16, seed=0, size=96, sections="both")["train"]
    work = tempfile.mkdtemp()
    save_policy(*build_policy([target(r) for r in data["report"]], 96), f"{work}/sft")
    scorers = text_scorers(cfg) if args.rewards else {n: Free() for n in text_scorers(cfg)}
    rewards = Rewards(scorers, None, similarity=lambda texts, rows: [float(len(t)) for t in texts])
    make = lambda name, rollout: make_trainer(f"{work}/sft", data, f"{work}/{name}", rewards, preset("laptop", max_new_tokens=args.tokens, rollout=rollout, k_clin=None), "language", 0.5, args.steps, 0)
    ours = make("ours", "merged")
    model, processor = load_policy(f"{work}/sft")
    theirs = timed(GRPOTrainer)(model, reward_funcs=rewards.functions(), args=copy.deepcopy(ours.args), train_dataset=conversations(data), processing_class=processor, peft_config=lora_config(model, "language", cfg.lora_r, cfg.lora_alpha))
    ours.__class__ = timed(type(ours))
    table = {}
    for name, trainer in {"TRL": theirs, "merged": ours}.items():
        trainer.generation_config.min_new_tokens = args.tokens
        trainer.train()
        table[name] = pd.DataFrame(trainer.spent).iloc[2:].median()
    t = pd.DataFrame(table)
    for end in ("", ", wall"): t.loc["update" + end] = t.loc["step" + end] - t.loc["before the update" + end]
    for end in ("", ", wall"): t.loc["reference, scoring" + end] = t.loc["before the update" + end] - t.loc["rollout" + end] - t.loc["rewards" + end]
    t = t.drop(["before the update", "before the update, wall"])
    t["ratio"] = t["TRL"] / t["merged"]
    print(f"{cfg.batch_size} prompts x {cfg.group_size}, {args.tokens} new tokens, {args.threads} threads, medians of {args.steps - 2} steps, rewards {'of laptop' if args.rewards else 'free'}\n{t.round(3).to_markdown()}")


if __name__ == "__main__": main()
