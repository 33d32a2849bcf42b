"""Where a benchmark's settings of SFT, the stages, GRPO, DPO and MMedPO come from: a grid, judged on the
validation studies of one seed (never on the test set). By hand, minutes to hours; finished phases are used
again. Writes figures/tune_BENCHMARK_PHASE_PARAMETERS.csv; with another seed than 0, that name ends in _seedN.

`sight` is what label F1 loses when every study is shown another study's image: a policy that writes one
report for all has none. Where the preset's own values are in the grid (`is_preset`), `gain` is a row's label
macro F1 less the preset's, with its paired 95 % interval over the same studies (`gain_lo`, `gain_hi`). Where
it holds 0, the two cannot be told apart. Where it leaves out 0, these two trained policies differ; whether
the settings do is not known, because another training run with the same setting would differ, too.

`overview` sets out all grids with a `gain` in one table, figures/tune_overview.csv.

python tests/tune_stages.py stage1 lr=7e-4,3e-4 beta=.02,.1 --set benchmark=r2gen_iu --set data_root=FOLDER
python tests/tune_stages.py overview"""

import argparse
import itertools
import json
from pathlib import Path

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
NAMES = dict(sft="SFT", stage1="stage 1", stage2="VALOR", grpo="GRPO", dpo="DPO", mmedpo="MMedPO")


def scored(phase: str, cfg: Config, val: Dataset, images: list[list]) -> pd.DataFrame:
    "Scores of the greedy reports that the policy of `phase` writes for `val` when it is shown `images`."
    model, processor = policy_of(phase, cfg)
    how = dict(batch_size=cfg.eval_batch_size, asked=asked_by(processor).questions(val))
    written = generate(model, processor, images, cfg.max_new_tokens, **how)
    return ev.score_reports(written, val, cfg.benchmark, labeler=labeler(cfg))


def on_validation(phase: str, cfg: Config) -> tuple[dict[str, float], pd.DataFrame]:
    "`SHOWN` measures of `phase` on the validation studies and its `sight`; the scores of each study."
    ensure(phase, cfg)
    val = load_data(phase_folder("data", cfg))["val"]
    images = image_lists(val)
    frame = scored(phase, cfg, val, images)
    own = ev.measure(frame)
    other = ev.measure(scored(phase, cfg, val, [images[i] for i in partners(len(val))]))
    sight = own["label micro F1"] - other["label micro F1"]
    return dict(sight=sight) | {name: own[name] for name in SHOWN}, frame


def gains(frames: dict[str, pd.DataFrame], against: str) -> pd.DataFrame:
    "`gain`, `gain_lo` and `gain_hi` of every row: its label macro F1 less that of the row `against`."
    by_seed = {name: {0: frame} for name, frame in frames.items()}
    found = [ev.paired_difference(by_seed, name, against, "label macro F1") for name in frames]
    return pd.DataFrame(found, columns=["gain", "gain_lo", "gain_hi"])


def grid(words: list[str]) -> list[dict]:
    "All combinations of the values in `words` such as `lr=7e-4,3e-4`."
    axes = {name: values.split(",") for name, values in (word.split("=", 1) for word in words)}
    return [dict(zip(axes, map(parse_value, chosen))) for chosen in itertools.product(*axes.values())]


def overview_row(path: Path) -> dict | None:
    "What the grid in the file `path` says of the preset, as a row of `overview`; None without a `gain`."
    table = pd.read_csv(path)
    if "gain" not in table or len(table) < 2:
        return None
    about = json.loads(path.with_suffix(".json").read_text())
    benchmark, seed = about["benchmarks"][0], about["seeds"][0]
    method = NAMES[path.stem.removeprefix(f"tune_{benchmark}_").split("_")[0]]
    parameters = list(table.columns[1 : table.columns.get_loc("sight")])
    tried = table[parameters].map("{:g}".format).agg(" ".join, axis=1)
    best = table[~table.is_preset].gain.idxmax()
    return dict(
        name=f"{benchmark}, {method}: {' '.join(parameters)}",
        tried=", ".join(tried),
        preset=table.name[table.is_preset.idxmax()],
        best_other=table.name[best],
        **table.loc[best, ["gain", "gain_lo", "gain_hi"]],
        seed=seed,
        file=path.stem,
    )


def overview() -> None:
    "Writes figures/tune_overview.csv: of each grid, how the best other value compares with the preset's."
    paths = sorted(path for path in figures_dir().glob("tune_*.csv") if path.stem != "tune_overview")
    table = pd.DataFrame([row for path in paths if (row := overview_row(path))])
    grids = [json.loads((figures_dir() / f"{stem}.json").read_text()) for stem in table.file]
    runs = sorted({run for grid in grids for run in grid["runs"]})
    save("tune_overview", table, runs=runs, note="see tests/tune_stages.py", out=figures_dir())
    print(table.to_string(index=False, float_format="{:.3f}".format))


def judge(phase: str, words: list[str], base: dict) -> None:
    "Trains (where it is not done) and judges the grid `words`, and writes its table."
    method = phase
    if phase == "grpo":
        phase, base = "stage2", base | changes_of("GRPO", preset("laptop", **base))
    tried = [(change, preset("laptop", **base | change)) for change in grid(words)]
    usual = preset("laptop", **base)
    rows, frames = [], {}
    for change, cfg in tried:
        name = ", ".join(f"{parameter} {value}" for parameter, value in change.items())
        measures, frames[name] = on_validation(phase, cfg)
        rows.append(dict(name=name) | change | measures | dict(is_preset=cfg == usual))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    if table.is_preset.any():
        table = table.join(gains(frames, table.name[table.is_preset.idxmax()]))
    cfgs = [cfg for _, cfg in tried]
    runs = [phase_folder(phase, cfg) for cfg in cfgs]
    stem = "_".join(["tune", cfgs[0].benchmark, method, *tried[0][0]])
    stem += f"_seed{cfgs[0].seed}" if cfgs[0].seed else ""
    save(stem, table, cfgs=cfgs, runs=runs, note=note_of(cfgs[0]), out=figures_dir())
    print(table.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=[*NAMES, "overview"])
    parser.add_argument("grid", nargs="*", metavar="NAME=VALUE,VALUE")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    if args.phase == "overview":
        overview()
    elif args.grid:
        judge(args.phase, args.grid, parse_settings(args.set))
    else:
        parser.error("grid: none was given; expected NAME=VALUE,VALUE, such as lr=7e-4,3e-4")
