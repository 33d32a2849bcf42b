"""Runs in processes of their own that are killed (SIGKILL) at a chosen moment, for test_resume.py and test_preference.py."""
import glob, hashlib, os, signal, subprocess, sys, time

import pytest


def start(code, runs):
    "The Python `code` in a new process that keeps its runs in the folder `runs`."
    env = os.environ | dict(VALOR_RUNS=str(runs), OMP_NUM_THREADS="1", IN_TEST="1")
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_at(code, runs, pattern, timeout, ready=lambda file: True):
    "Start `code` and kill it as soon as a file below `runs` that matches `pattern` is there and `ready`."
    process, end = start(code, runs), time.time() + timeout
    while not any(map(ready, glob.glob(str(runs / pattern)))):
        if process.poll() is not None: pytest.fail(f"the run ended before {pattern}: {process.stderr.read()[-2000:]}")
        if time.time() > end: process.kill(); pytest.fail(f"no {pattern} within {timeout} s")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def kill_everywhere(code, tmp_path, points, patience, timeout, ready=lambda file: True):
    "Two run folders: of `code` left alone, and of it killed at each of `points` and then started once more. `patience`: seconds for a whole run, `timeout`: for a point to be reached."
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(code, whole)
    assert reference.wait(patience) == 0, reference.stderr.read()[-2000:]
    for pattern in points:
        kill_at(code, killed, pattern, timeout, ready)
        assert not list(killed.glob(pattern.split("/")[0] + "/done.json")), f"{pattern}: the kill came too late to test anything"
    last = start(code, killed)
    assert last.wait(patience) == 0, last.stderr.read()[-2000:]
    return whole, killed


def digests(runs, patterns):
    "{path below `runs`: SHA-256} of the files that match `patterns`."
    found = sorted(p for pattern in patterns for p in runs.glob(pattern))
    return {str(p.relative_to(runs)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}
