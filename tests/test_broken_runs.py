"""What is broken, full or interrupted costs one line and nothing that was made: checkpoints, folders,
media that cannot be written, keys that end a run."""

import errno
import json
import os
import shutil
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch

from valor import cli
from valor.config import preset, runs_dir
from valor.figures import sidecar
from valor.files import whole
from valor.rewards.text import Store, StoreError
from valor.runs import makers, phases, processes, systems
from valor.train.grpo import MOST_SNAPSHOTS, Rewards, snapshot_every
from valor.train.sft import TrainingError, train_to_end

TINY = dict(
    threads=1,
    n_train=8,
    n_val=2,
    n_test=4,
    base_studies=8,
    warmup_epochs=0,
    render_copies=1,
    sft_epochs=1,
    sft_batch_size=4,
    stage1_steps=4,
    stage2_steps=2,
    save_steps=2,
    expert_steps=1,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    threads = torch.get_num_threads()
    with patch.dict(os.environ, VALOR_RUNS=str(tmp_path_factory.mktemp("runs"))):
        yield runs_dir()
    torch.set_num_threads(threads)


def test_a_batch_that_no_studies_fill_is_an_error_before_anything_is_trained(runs):
    cfg = preset("smoke", **TINY | dict(n_train=3, batch_size=8))
    for phase in ("stage1", "stage2", "eval_stage2", "progress_stage1"):
        with pytest.raises(processes.RunError, match="batch_size = 8, but there are 3 training studies"):
            phases.ensure(phase, cfg)
    with pytest.raises(processes.RunError, match="batch_size = 8, but there are 3 training studies"):
        systems.frames_of([cfg])
    assert {p.name.split("-")[0] for p in runs.iterdir() if p.is_dir()} == {"data"}


def test_a_stage_goes_on_from_the_older_checkpoint_where_the_newest_is_broken(runs, capsys):
    """Left alone, and cut off at its end with the newest checkpoint broken in each of these ways: the
    same adapter."""
    cfg = preset("smoke", **TINY | dict(stage1_steps=6))  # the last update has no checkpoint
    phases.ensure("sft", cfg)
    with patch.object(phases, "drop_checkpoints"):
        folder = phases.ensure("stage1", cfg)
    shutil.move(folder / "checkpoints", runs / "kept")
    weights = folder / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    assert sorted(p.name for p in (runs / "kept").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    for name, spoil in {
        "scheduler.pt": lambda p: p.unlink(),
        "adapter_model.safetensors": lambda p: p.write_bytes(
            p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])
        ),
    }.items():
        for p in (folder / "done.json", weights, folder / "log.csv"):
            p.unlink()
        shutil.copytree(runs / "kept", folder / "checkpoints")
        (folder / "checkpoints" / "checkpoint-x").mkdir()
        spoil(folder / "checkpoints" / "checkpoint-4" / name)
        phases.ensure("stage1", cfg)
        said = capsys.readouterr().out
        assert (
            f"checkpoint-4: {name} is missing or differs from what was written; resuming from checkpoint-2"
            in said
        )
        assert weights.read_bytes() == whole


def test_a_finished_run_is_read_where_nothing_can_be_written(runs):
    cfg = preset("smoke", **TINY)
    folder = phases.ensure("stage1", cfg)
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*")}

    def refused(*args, **kw):
        raise OSError(errno.EROFS, "Read-only file system")

    with patch.object(phases, "locked", refused), patch.object(phases, "whole", refused):
        assert phases.ensure("stage1", cfg) == folder
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*")} == before


def test_training_that_makes_no_update_is_an_error():
    class Empty:
        class state:
            global_step, max_steps = 0, 2

        class args:
            output_dir, world_size = "/nonexistent", 1

        model, train_dataset = torch.nn.Linear(1, 1), [1, 2, 3]

        def is_world_process_zero(self):
            return True

        def add_callback(self, callback):
            pass

        def train(self, resume_from_checkpoint):
            pass

    with pytest.raises(TrainingError, match="stage 1: 0 of 2 updates were made.*3 rows"):
        train_to_end(Empty(), "stage 1")


@pytest.mark.parametrize(
    "eval_steps, steps, every", [(250, 101_546, 5_000), (10, 50, 10), (2, 4, 2), (1, 21, 1), (1, 22, 2)]
)
def test_snapshots_are_bounded(eval_steps, steps, every):
    assert (
        snapshot_every(eval_steps, steps) == every
        and (steps - 1) // every <= MOST_SNAPSHOTS
        and every % eval_steps == 0
    )


def test_an_expert_without_a_number_costs_no_training():
    rewards = Rewards({}, 4, similarity=lambda texts, rows: [0.5, float("nan"), 1e300, -2.0])
    score = rewards.functions()[0]
    assert score(completions=["a"] * 4, report=["b"] * 4, study_id=["s1", "s2", "s3", "s4"]) == [
        0.5,
        -1.0,
        1e6,
        -2.0,
    ]
    assert rewards.odd["similarity"] == ["s2", "s3"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    "The second comes and goes while the first is writing."

    with whole(tmp_path / "t.csv") as first:
        first.write_text("first")
        with whole(tmp_path / "t.csv") as second:
            second.write_text("second")
    assert (tmp_path / "t.csv").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["t.csv"]
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "t.csv") as third:
        third.write_text("half")
        1 / 0
    assert (tmp_path / "t.csv").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_the_sidecar_says_what_a_run_was_computed_on(tmp_path):
    with patch.dict(os.environ, VALOR_RUNS=str(tmp_path)):
        for run, threads in (("sft-1", 1), ("sft-2", 2)):
            (tmp_path / run).mkdir()
            (tmp_path / run / "config.json").write_text(
                json.dumps(dict(versions={}, threads=threads, cpu="Z80"))
            )
        assert sidecar("x", runs=["sft-1", "sft-2", "sft-3"])["computed_on"] == [
            dict(threads=1, cpu="Z80"),
            dict(threads=2, cpu="Z80"),
        ]


def test_a_damaged_store_is_named_and_a_frozen_one_is_read(tmp_path):
    Store(tmp_path, "k").put({"a": b"1"})
    with patch("valor.rewards.text.os.access", return_value=False):
        frozen = Store(tmp_path, "k")
        assert frozen.get(["a", "b"]) == {"a": b"1"}
        frozen.put({"b": b"2"})
        assert frozen.get(["b"]) == {} and Store(tmp_path / "none", "k").get(["a"]) == {}
    (tmp_path / "scores.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(StoreError, match="scores.sqlite: is damaged .*; delete it"):
        Store(tmp_path, "k")


def test_scorers_are_tried_once(runs):
    makers.LOADED.clear()
    with patch.object(makers, "probe", wraps=makers.probe) as probe:
        for _ in range(2):
            makers.check_scorers([preset("smoke"), preset("smoke", seed=1)])
        assert probe.call_count == 1
        makers.check_scorers([preset("smoke", lambda_length=0.1)])
        assert probe.call_count == 2


@pytest.mark.parametrize(
    "error, says",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/r/x.pt"),
            "/r/x.pt: the disk is full; free some of it, then the same command goes on",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
            "the disk is full",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/r/x.lock"),
            "/r/x.lock: cannot be read or written (Read-only file system)",
        ),
    ],
)
def test_a_disk_ends_a_command_in_one_line(error, says):
    def work():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.in_one_line(work)
    assert says in str(end.value) and "\n" not in str(end.value)
    with pytest.raises(KeyError):
        cli.in_one_line(lambda: {}["a fault of ours"])


def test_interrupted_is_one_line_and_130(capsys):
    def work():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.in_one_line(work)
    assert (
        end.value.code == 130
        and capsys.readouterr().err == "\nvalor: interrupted; the same command goes on\n"
    )


def test_a_run_ends_with_the_graph_that_started_it(tmp_path):
    parent = subprocess.Popen(["sleep", "60"])
    code = (
        "from valor.runs import processes\nprocesses.end_with_parent()\nprint('begun', flush=True)\nimport "
        "time; time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | dict(VALOR_ENDS_WITH=str(parent.pid)),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "begun\n"
    parent.kill()
    parent.wait()
    assert child.wait(timeout=30) == 1
