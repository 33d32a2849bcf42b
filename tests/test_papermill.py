"""The ablation page takes parameters from the command line, from the repository root, and refuses wrong
ones before anything is trained. Pages 08 and 09 are made of kept seeds where nothing was run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from valor.config import preset
from valor.metrics.convergence import NAMES
from valor.metrics.seeds import write_seed
from valor.metrics.statistics import STATISTICS
from valor.runs.phases import phase_folder

ROOT = Path(__file__).resolve().parents[1]


def papermill(runs, *parameters, page="08_ablation", size="smoke"):
    command = [sys.executable, "-m", "papermill", f"nbs/{page}.ipynb", "-p", "preset", size]
    command += ["--no-progress-bar"]
    for name, value in parameters:
        command += ["-p", name, value]
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(VALOR_RUNS=str(runs))
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )  # stdout is no terminal: no output path needed


def test_given_parameters_are_run_and_shown_against_the_default(tmp_path):
    done = papermill(tmp_path, ("lambda_vis", "0.25"), ("k_clin", "1"), ("seed", "3"))
    assert done.returncode == 0, done.stderr[-3000:]
    text = "".join(
        "".join(o.get("text", "") or o.get("data", {}).get("text/plain", ""))
        for c in json.loads(done.stdout)["cells"]
        for o in c.get("outputs", [])
    )
    assert "{'lambda_vis': 0.25, 'k_clin': 1}" in text and "default" in text and "seeds [3]" in text
    stages = [json.loads(p.read_text())["config"]["fields"] for p in tmp_path.glob("stage2-*/config.json")]
    assert sorted(f["lambda_vis"] for f in stages) == [0.25, 0.5]


def test_wrong_parameters_stop_before_anything_is_trained(tmp_path):
    for name, value, message in (
        ("lambda_vis", "high", "lambda_vis='high' is a str; expected float or int"),
        ("lambda_vis", "1.5", "lambda_vis=1.5 is not allowed"),
        ("benchmark", "mimic", "benchmark='mimic'"),
        ("lambda_viz", "0.5", "unknown parameter lambda_viz"),
    ):
        done = papermill(tmp_path, (name, value))
        assert done.returncode != 0 and message in done.stderr, (name, value, done.stderr[-1500:])
    assert not list(tmp_path.iterdir())


def keep_made_up_seeds(out, systems):
    "Seeds 0 and 1 of `systems` {row: its seeds} with made-up numbers, as pages keep them in `out`."
    rng = np.random.default_rng(0)
    for seed in (0, 1):
        index = [f"phantom-test-{seed}-{i:05}" for i in range(20)]
        rows = [row for row, seeds in systems.items() if seed in seeds]
        numbers = rng.integers(1, 5, (len(rows), 20, len(STATISTICS))).astype(float)
        frames = {row: pd.DataFrame(n, index, STATISTICS) for row, n in zip(rows, numbers)}
        write_seed(frames, preset("laptop", seed=seed), note="made up", out=out / "seeds")


def test_tables_are_made_of_kept_seeds_where_nothing_was_run(tmp_path):
    out, both = tmp_path / "figures", [0, 1]
    rows = {
        "VALOR": both,
        "VALOR w/o visual": both,
        "DPO": [1],
        "lambda_vis 0.25": [0],
        "best fixed report": both,
    }
    keep_made_up_seeds(out, rows)
    done = papermill(
        tmp_path / "runs",
        ("missing", "skip"),
        ("draws", "1000"),
        ("out", str(out)),
        page="09_main_results",
        size="laptop",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(out / "table1_phantom.csv").set_index(["system", "metric"])
    assert table.seeds["VALOR", "BLEU-4"] == 2 and table.seeds["DPO", "BLEU-4"] == 1
    assert (
        "lambda_vis 0.25" not in table.index.levels[0]
        and "made up" in (out / "table1_phantom.md").read_text()
    )
    run = {seed: phase_folder("stage2", preset("laptop", seed=seed)).name for seed in both}
    log = dict(setting="default", k=range(1, 41)) | dict.fromkeys(NAMES, 0.5)
    logs = pd.concat([pd.DataFrame(log | dict(seed=seed, run=run[seed])) for seed in both])
    logs.to_csv(out / "convergence_phantom.csv", index=False)
    done = papermill(
        tmp_path / "runs", ("missing", "skip"), ("draws", "1000"), ("out", str(out)), size="laptop"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(out / "ablation_phantom.csv").set_index(["system", "metric"])
    seeds = {row: table.seeds[row, "BLEU-4"] for row in ("default", "lambda_vis 0.0", "lambda_vis 0.25")}
    # one setting has seed 0 alone, so all are compared on seed 0
    assert seeds == {"default": 1, "lambda_vis 0.0": 1, "lambda_vis 0.25": 1}
