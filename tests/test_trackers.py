"""Curves and sample reports go to the trackers that are asked for; nothing restricted leaves by them."""

import sys
import types

import pytest
from PIL import Image

from valor.config import preset
from valor.train import trackers

CFG = preset("smoke")


class Trainer:
    "As much of a `ValorTrainer` as trackers read: two studies with two candidates each."

    num_generations, newest_rewards = 2, [0.4, 0.3, 0.2, 0.1]

    def __init__(self):
        self.args, self.added = types.SimpleNamespace(), []
        film = Image.new("L", (8, 8), 100)
        self._inputs = [dict(study_id=s, image=film, report=f"report of {s}") for s in ("a", "a", "b", "b")]
        self._logs = dict(completion=["old", "one", [dict(role="assistant", content="two")], "three", "four"])

    def is_world_process_zero(self):
        return True

    def add_callback(self, callback):
        self.added.append(callback)


@pytest.fixture
def known(monkeypatch):
    "A tracker that keeps what it gets, in the place of each that transformers knows."

    class Kept(trackers.TrainerCallback):
        def __init__(self):
            self.got, self.samples = [], []

        def on_log(self, args, state, control, logs=None, **kw):
            self.got.append(logs)

    monkeypatch.setattr(trackers, "get_reporting_integration_callbacks", lambda names: [Kept for _ in names])
    for name in trackers.SAMPLE_WRITERS:
        writer = lambda callback, samples, step: callback.samples.append((step, samples))  # noqa: E731
        monkeypatch.setitem(trackers.SAMPLE_WRITERS, name, writer)


def logged(trainer, step, **logs):
    state = types.SimpleNamespace(is_world_process_zero=True, global_step=step)
    for callback in trainer.added:
        callback.on_log(None, state, None, logs=logs)


def tracked(**change):
    import dataclasses

    trainer = Trainer()
    trackers.track(trainer, dataclasses.replace(CFG, sample_every=2, **change), "stage1-0")
    return trainer


def test_names_are_clear_and_samples_come_with_their_films(known):
    trainer = tracked(report_to="wandb")
    for step in (1, 2, 3):
        logged(trainer, step, loss=0.1, kl=0.2, **{"rewards/chexbert/mean": float("nan")})
    (wandb, _), args = trainer.added, trainer.args
    assert wandb.got[0] == {"loss": 0.1, "policy/KL to SFT": 0.2} and args.run_name == "stage1-0"
    ((step, samples),) = wandb.samples
    assert step == 2 and [(s.study, s.report, s.reward) for s in samples] == [
        ("a", "one", 0.4),
        ("b", "three", 0.2),
    ]
    assert samples[0].film.size == (8, 8) and samples[0].reference == "report of a"


def test_each_phase_has_a_wandb_run_of_its_own(known):
    (callback,) = tracked(report_to="wandb").added[:1]
    finished = []
    callback._wandb = types.SimpleNamespace(run="stage1-0", finish=lambda: finished.append("stage1-0"))
    callback.on_train_end(None, None, None)
    callback._wandb.run = None
    callback.on_train_end(None, None, None)
    assert finished == ["stage1-0"]


def test_no_report_of_restricted_studies_goes_to_a_tracker_that_may_send_it(known):
    trainer = tracked(report_to="wandb,tensorboard,mlflow,trackio", benchmark="mimic_cxr_jpg")
    logged(trainer, 2, loss=0.1)
    assert [len(t.samples) for t in trainer.added[:4]] == [0, 1, 0, 0]
    assert all(t.got for t in trainer.added[:4])  # numbers do


def test_none_is_the_default(known):
    assert CFG.report_to == "" and tracked().added == []


@pytest.mark.parametrize(
    "named, message",
    [
        ("tensorbord", "no tracker 'tensorbord'; expected .*did you mean 'tensorboard'"),
        ("clearml", "clearml is not installed; expected `pip install clearml`"),
    ],
)
def test_an_unknown_or_missing_tracker_is_one_line(named, message):
    with pytest.raises(ValueError, match=message):
        preset("smoke", report_to=named)


def test_tensorboard_gets_curves_and_films(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import TrainerControl, TrainerState, TrainingArguments

    monkeypatch.setenv("VALOR_RUNS", str(tmp_path))
    trainer = tracked(report_to="tensorboard")
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(is_world_process_zero=True)
    state.is_hyper_param_search, state.global_step = False, 2
    for event in ("on_train_begin", "on_log", "on_train_end"):
        for callback in trainer.added:
            getattr(callback, event)(args, state, TrainerControl(), logs=dict(loss=0.1, reward=0.5))
    found = EventAccumulator(str(tmp_path / "trackers" / "stage1-0"))
    found.Reload()
    assert found.Scalars("train/reward/R")[0].value == 0.5 and found.Images("samples/0")[0].width == 8
    assert "tensorboard" in sys.modules
