"""`valor train` on two CPU processes: it trains, and a pair of which one was killed, started again, ends
as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from kills import CPU, finish_pair

TRAIN = [
    "train",
    "--preset",
    "smoke",
    "--set",
    "threads=1",
    "--set",
    "n_train=8",
    "--set",
    "sft_batch_size=4",
    "--set",
    "stage1_steps=7",
    "--set",
    "expert_steps=2",
    "--set",
    "save_steps=1",
    "--until",
    "stage1",
]


def launch(runs, port):
    "As a user does it."
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={port}",
        "-m",
        "valor",
        *TRAIN,
    ]
    env = os.environ | CPU | dict(VALOR_RUNS=str(runs), OMP_NUM_THREADS="1")
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def code(*more):
    return f"from valor.cli import main; main({[*TRAIN, *more]})"


def adapter(runs):
    (folder,) = [p for p in Path(runs).glob("stage1-*") if p.is_dir()]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), (
        folder / "log.csv"
    ).read_text().splitlines()


def test_killed_pair_resumes(tmp_path):
    "An epoch has four updates; the pair is killed in the second epoch."
    out, _ = finish_pair(code(), tmp_path / "whole", 29531, 400)
    (folder,) = [p for p in (tmp_path / "whole").glob("stage1-*") if p.is_dir()]
    assert json.loads((folder / "config.json").read_text())["processes"] == 2
    assert out.count("stage1-") == 2  # said once (folder, and how to merge it), by the first process
    shutil.copytree(
        tmp_path / "whole", tmp_path / "killed", ignore=shutil.ignore_patterns("stage1-*")
    )  # to save time: what comes before is the same
    killed = launch(tmp_path / "killed", 29532)
    deadline = time.time() + 300
    while not list((tmp_path / "killed").glob("stage1-*/checkpoints/checkpoint-5/trainer_state.json")):
        assert time.time() < deadline and killed.poll() is None, killed.stderr.read()[-3000:]
        time.sleep(0.02)
    os.kill(
        int(Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()[-1]), signal.SIGKILL
    )  # one of the two
    assert killed.wait(timeout=120) != 0  # the other does not wait for it for ever
    finish_pair(code(), tmp_path / "killed", 29533, 400)
    (a, log), (b, again) = adapter(tmp_path / "whole"), adapter(tmp_path / "killed")
    assert a == b and len(log) == len(again)


def test_bad_settings_end_both(tmp_path):
    _, err = finish_pair(code("--set", "sft_batch_size=3"), tmp_path / "runs", 29534, 300, codes=(1, 1))
    assert err.count("sft_batch_size = 3 cannot be shared by 2 processes") >= 2
