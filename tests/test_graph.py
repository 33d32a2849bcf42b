"""The graph of all tables and figures: what it plans, that only what changed runs again, the same on
SLURM, and one line for a wrong parameter. The jobs themselves are replaced by a stub."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
STUB = """#!/bin/sh
printf '%s\\n' "$(echo "$@" | tr '\\n' ' ')" >> "$JOBS"
if [ "$2" = papermill ]; then cp "$3" "$4"; fi
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A copy of what the graph reads, with a stub in place of Python."
    d = tmp_path_factory.mktemp("graph")
    for name in ("Snakefile", "settings.ini"):
        shutil.copy(ROOT / name, d)
    for name in ("valor", "nbs", "profiles"):
        shutil.copytree(
            ROOT / name, d / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    (d / "stub").write_text(STUB)
    (d / "stub").chmod(0o755)
    return d


def graph(
    place,
    *options,
    config=(
        "preset=smoke",
        "seeds=0,1",
        "benchmarks=phantom",
        "pages=08_ablation,11_progression,12_qualitative",
    ),
):
    "The finished process, and the jobs that it ran."
    log = place / "jobs.txt"
    log.write_text("")
    env = {k: v for k, v in os.environ.items() if k not in ("VALOR_RUNS", "VALOR_FIGURES")} | dict(
        JOBS=str(log), PYTHONPATH=str(place)
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "-j",
            "2",
            "--config",
            *config,
            f"python={place / 'stub'}",
            *options,
        ],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done, log.read_text().splitlines()


def planned(done):
    return {
        rule: int(n)
        for rule, n in re.findall(
            r"^(all|systems|setting|progress|page) +(\d+)$", done.stdout + done.stderr, re.M
        )
    }


def test_every_page_is_planned_for_slurm_too(place):
    done, jobs = graph(place, "-n", "--profile", "profiles/slurm", config=("preset=laptop",))
    assert done.returncode == 0, done.stderr[-3000:]
    pages = sum('"parameters"' in p.read_text() for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))
    assert (
        planned(done) == dict(all=1, page=pages + 3, systems=2 * 4, setting=2 * 4 * 7 + 4 * 7, progress=4 * 5)
        and jobs == []
    )  # Tables 1, 3 and 4 twice, and the page with more sweeps


def test_only_what_changed_runs_again(place):
    done, jobs = graph(place)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.search(
        r"(\d+) phases, none finished; .*\n(?:.*\n)*?on .+, 1 thread\(s\) a job; runs in", done.stderr
    )
    assert int(said[1]) > 2 * 17, done.stderr[:2000]  # of two seeds
    assert (
        sum("papermill" in j for j in jobs) == 4 and len(jobs) == 4 + 2 + 2 * (3 + 7) + 2 * 5
    )  # pages, systems, settings, progress
    assert any('"group_size": 8, "batch_size": 1' in j for j in jobs)
    assert any('"lambda_vis": 1.0' in j and j.endswith("progress_stage1 progress_stage2 ") for j in jobs)
    assert graph(place)[1] == []
    page = place / "nbs" / "12_qualitative.ipynb"
    page.write_text(page.read_text().replace("Which cases", "Which of the cases"))
    assert [re.search(r"nbs/\S+", j)[0] for j in graph(place)[1]] == ["nbs/12_qualitative.ipynb"]
    _, jobs = graph(
        place, config=("preset=smoke", "seeds=0,1,2", "benchmarks=phantom", "pages=12_qualitative")
    )
    assert jobs == []  # the page shows the first seed only
    _, jobs = graph(place, config=("preset=smoke", "seeds=0,1,2", "benchmarks=phantom", "pages=08_ablation"))
    assert (
        sum('"seed": 2' in j for j in jobs) == 1 + 3 + 7
        and sum("papermill" in j for j in jobs) == 2
        and len(jobs) == 13
    )


def test_what_a_killed_graph_left_locked_is_gone_on_with(place):
    """Its locks are in the way while it lives (the system knows: it holds a lock of the file
    valor.alive), and no longer."""
    few = ("preset=smoke", "seeds=7", "benchmarks=phantom", "pages=12_qualitative")
    locks = place / ".snakemake" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    (locks / "0.output.lock").write_text("runs/graph/smoke/phantom/seed7/systems\n")
    with open(place / ".snakemake" / "valor.alive", "w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        done, jobs = graph(place, config=few)
        assert done.returncode != 0 and "cannot be locked" in done.stdout + done.stderr and jobs == []
    done, jobs = graph(place, config=few)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(jobs) == 2 and all(
        '"threads": 1' in j for j in jobs
    )  # the page is shown on the threads that its runs had: else it would find none


def test_slurm_jobs_ask_for_a_gpu():
    assert (
        yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())["default-resources"]["gpu"]
        == 1
    )


@pytest.mark.parametrize(
    "config, message",
    [
        (("preset=smok",), "preset='smok' is unknown"),
        (("seeds=a",), "seeds=a: expected whole numbers separated by commas"),
        (("benchmarks=mimic",), "benchmark='mimic'"),
        (("pages=99_none",), "pages=99_none: no such page"),
    ],
)
def test_a_wrong_parameter_is_one_line(place, config, message):
    done, jobs = graph(place, "-n", config=config)
    assert done.returncode != 0 and message in done.stdout + done.stderr and jobs == []
