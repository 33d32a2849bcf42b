"""Where a benchmark's settings of SFT, the stages, GRPO, DPO and MMedPO come from: a grid, judged on the
validation studies of one seed (never on the test set). By hand, minutes to hours; finished phases are used
again. Writes figures/tune_BENCHMARK_PHASE_PARAMETERS.csv.

`sight` is what label F1 loses when every study is shown another study's image: a policy that writes one
report for all has none.

python tests/tune_stages.py stage1 lr=7e-4,3e-4 beta=.02,.1 --set benchmark=r2gen_iu --set data_root=FOLDER"""

import argparse
import itertools

import pandas as pd
from datasets import Dataset

from valor.config import Config, figures_dir, parse_settings, parse_value, preset
from valor.expert.controls import partners
from valor.figures import save
from valor.metrics import statistics as ev
from valor.policy.prompt import asked_by, image_lists
from valor.policy.tiny import generate
from valor.runs.makers import labeler, note_of, policy_of
from valor.runs.phases import ensure, load_data, phase_folder
from valor.runs.systems import changes_of

SHOWN = ["BLEU-4", "ROUGE-L", "label micro F1", "label macro F1", "located F1", "hallucinated"]
SHOWN += ["abnormal recall", "specificity", "words"]


def measured(phase: str, cfg: Config, val: Dataset, images: list[list]) -> pd.Series:
    "Measures of the greedy reports that the policy of `phase` writes for `val` when it is shown `images`."
    model, processor = policy_of(phase, cfg)
    how = dict(batch_size=cfg.eval_batch_size, asked=asked_by(processor).questions(val))
    written = generate(model, processor, images, cfg.max_new_tokens, **how)
    return pd.Series(ev.measure(ev.score_reports(written, val, cfg.benchmark, labeler=labeler(cfg))))


def on_validation(phase: str, cfg: Config) -> dict[str, float]:
    "`SHOWN` measures of `phase` on the validation studies, and its `sight`."
    ensure(phase, cfg)
    val = load_data(phase_folder("data", cfg))["val"]
    images = image_lists(val)
    own = measured(phase, cfg, val, images)
    other = measured(phase, cfg, val, [images[i] for i in partners(len(val))])
    return dict(sight=own["label micro F1"] - other["label micro F1"]) | own[SHOWN].to_dict()


def grid(words: list[str]) -> list[dict]:
    "All combinations of the values in `words` such as `lr=7e-4,3e-4`."
    axes = {name: values.split(",") for name, values in (word.split("=", 1) for word in words)}
    return [dict(zip(axes, map(parse_value, chosen))) for chosen in itertools.product(*axes.values())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=["sft", "stage1", "stage2", "grpo", "dpo", "mmedpo"])
    parser.add_argument("grid", nargs="+", metavar="NAME=VALUE,VALUE")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    phase, base = args.phase, parse_settings(args.set)
    if phase == "grpo":
        phase, base = "stage2", base | changes_of("GRPO", preset("laptop", **base))
    tried = [(change, preset("laptop", **base | change)) for change in grid(args.grid)]
    rows = []
    for change, cfg in tried:
        name = ", ".join(f"{parameter} {value}" for parameter, value in change.items())
        rows.append(dict(name=name) | change | on_validation(phase, cfg))
        print(rows[-1], flush=True)
    cfgs = [cfg for _, cfg in tried]
    runs = [phase_folder(phase, cfg) for cfg in cfgs]
    stem = "_".join(["tune", cfgs[0].benchmark, args.phase, *tried[0][0]])
    save(stem, pd.DataFrame(rows), cfgs=cfgs, runs=runs, note=note_of(cfgs[0]), out=figures_dir())
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format))
