"""The ablation page takes parameters from the command line, from the repository root, and refuses wrong
ones before anything is trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def papermill(runs, *parameters):
    command = [
        sys.executable,
        "-m",
        "papermill",
        "nbs/08_ablation.ipynb",
        "-p",
        "preset",
        "smoke",
        "--no-progress-bar",
    ]
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
