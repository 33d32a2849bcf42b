"""A run that is killed (SIGKILL) in SFT, stage 1 and stage 2 ends with the weights of one that was not, bit for bit."""
import glob, hashlib, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

RUN = """
import sys
from valor.config import preset
from valor.experiment import ensure
ensure("stage2", preset("smoke", threads=1))
"""
# where to kill: the first file matching the pattern says that the phase is past its first checkpoint, or has just begun
POINTS = ["sft-*/policy/checkpoints/checkpoint-4/trainer_state.json", "stage1-*/config.json",
          "stage1-*/checkpoints/checkpoint-2/trainer_state.json", "stage2-*/checkpoints/checkpoint-2/optimizer.pt"]


def start(runs):
    env = os.environ | dict(VALOR_RUNS=str(runs), OMP_NUM_THREADS="1", IN_TEST="1")
    return subprocess.Popen([sys.executable, "-c", RUN], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_at(runs, pattern, timeout=300):
    process, end = start(runs), time.time() + timeout
    while not glob.glob(str(runs / pattern)):
        if process.poll() is not None: pytest.fail(f"the run ended before {pattern}: {process.stderr.read()[-2000:]}")
        if time.time() > end: process.kill(); pytest.fail(f"no {pattern} within {timeout} s")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def weights(runs):
    found = sorted(p for pattern in ("sft-*/policy/model.safetensors", "stage*-*/adapter/adapter_model.safetensors", "stage*-*/snapshots/*/adapter_model.safetensors") for p in runs.glob(pattern))
    return {str(p.relative_to(runs)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_killed_runs_end_as_if_they_had_not_been(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(whole)
    assert reference.wait(600) == 0, reference.stderr.read()[-2000:]
    for pattern in POINTS:
        kill_at(killed, pattern)
        assert not list(killed.glob(pattern.split("/")[0] + "/done.json")), f"{pattern}: the kill came too late to test anything"
    last = start(killed)
    assert last.wait(600) == 0, last.stderr.read()[-2000:]
    assert len(weights(whole)) == 5                                    # SFT, two stages, and a snapshot in each
    assert weights(killed) == weights(whole)
    assert not list(killed.rglob("checkpoints"))
