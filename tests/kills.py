"""Runs in processes of their own, in pairs too, that are killed (SIGKILL) at a chosen moment.

A fork server imports the package once, so that a process starts in no time."""

import glob
import hashlib
import multiprocessing
import os
import shutil
import sys
import time

import pytest
import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["valor.runs.makers", "valor.runs.systems"])
CPU = dict(
    ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES=""
)  # what a process of several is told, to leave a GPU alone


def work(code, runs, log, env):
    os.environ.update(env, VALOR_RUNS=str(runs), IN_TEST="1")
    torch.set_num_threads(1)
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{log}.{end}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream.fileno())
    exec(code, {})


def start(code, runs, log=None, **env):
    """The Python `code` in a new process that keeps its runs in the folder `runs`, and what it prints
    beside it (or beside `log`)."""
    process = SERVER.Process(target=work, args=(code, runs, log or runs, env))
    process.start()
    return process


def says(runs):
    return open(f"{runs}.err").read()[-3000:]


def ended(process, patience):
    "Its exit code, after `patience` seconds at most."
    process.join(patience)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


def finish(code, runs, patience):
    "What `code` prints when it is run to its end, in `patience` seconds at most."
    assert ended(start(code, runs), patience) == 0, says(runs)
    return open(f"{runs}.out").read()


def finish_pair(code, runs, port, patience, codes=(0, 0), **env):
    """What `code` prints, and what it complains of, on two CPU processes that torch joins, as a launcher
    would start them."""
    env |= CPU | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logs = [f"{runs}.{rank}" for rank in (0, 1)]
    pair = [
        start(code, runs, log, RANK=str(rank), LOCAL_RANK=str(rank), **env) for rank, log in enumerate(logs)
    ]
    assert tuple(ended(process, patience) for process in pair) == codes, "\n".join(map(says, logs))
    return ["".join(open(f"{log}.{stream}").read() for log in logs) for stream in ("out", "err")]


def kill_at(code, runs, pattern, timeout, ready=lambda file: True):
    "Start `code` and kill it as soon as a file below `runs` that matches `pattern` is there and `ready`."
    process, end = start(code, runs), time.time() + timeout
    while not any(map(ready, glob.glob(str(runs / pattern)))):
        if not process.is_alive():
            pytest.fail(f"the run ended before {pattern}: {says(runs)}")
        if time.time() > end:
            process.kill()
            pytest.fail(f"no {pattern} within {timeout} s")
        time.sleep(0.005)
    process.kill()
    process.join()


def kill_everywhere(code, tmp_path, phases, points, patience, timeout, ready=lambda file: True):
    """Two run folders: of `code` left alone, and of it killed at each of `points` and then started once
    more. `patience`: seconds for a whole run, `timeout`: for a point to be reached.

    The second has from the first, to save time, every phase that is not one of `phases`: what comes
    before the first kill."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(code, whole, patience)
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns(*(f"{phase}-*" for phase in phases)))
    for pattern in points:
        kill_at(code, killed, pattern, timeout, ready)
        assert not list(killed.glob(pattern.split("/")[0] + "/done.json")), (
            f"{pattern}: the kill came too late to test anything"
        )
    finish(code, killed, patience)
    return whole, killed


def digests(runs, patterns):
    "{path below `runs`: SHA-256} of the files that match `patterns`."
    found = sorted(p for pattern in patterns for p in runs.glob(pattern))
    return {str(p.relative_to(runs)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}
