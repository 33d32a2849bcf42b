"""What a command says before it begins (`--dry-run`), and how far it is, by what earlier runs took."""

import dataclasses
import json
import re
import time

import pandas as pd
import pytest

from valor.cli import main
from valor.config import preset, runs_dir
from valor.runs import phases, plan
from valor.train.memory import llava_med_7b

CFG = preset("smoke", threads=1)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(plan, "times_elsewhere", lambda threads: [])
    return tmp_path / "runs"


def finished(step, seconds, resumed=False):
    "Make the folder of `step` that of a finished phase which took `seconds`."
    step.folder.mkdir(parents=True)
    record = dict(config=dict(phase=step.phase), full=dataclasses.asdict(step.cfg))
    (step.folder / "config.json").write_text(json.dumps(record))
    cost = phases.cost_of(time.perf_counter(), resumed) | dict(seconds=seconds)
    (step.folder / "done.json").write_text(json.dumps(dict(files={}, cost=cost)))


def test_a_job_has_each_phase_once_and_in_order(runs):
    from valor.runs.systems import wanted_by_run

    steps = plan.steps_for(wanted_by_run(CFG))
    assert len({s.folder for s in steps}) == len(steps) == 18
    made = []
    for step in steps:
        assert all(before in made for before in phases.PHASES[step.phase].after), step.label
        made.append(step.phase)


def test_dry_run_makes_nothing(runs, capsys):
    main(["run", "--preset", "smoke", "--dry-run"])
    said = capsys.readouterr().out
    assert "18 phases, none finished; how long the others take is unknown" in said and not runs.exists()
    assert re.search(r"^7 +stage 1 +to do +4 +unknown", said, re.M)


def test_dry_run_refuses_what_the_command_would(runs):
    with pytest.raises(SystemExit, match="did you mean 'lambda_vis'"):
        main(["run", "--preset", "smoke", "--dry-run", "--set", "lambda_viz=1"])


def test_time_is_that_of_the_newest_run_of_the_same_kind(runs, capsys):
    steps = plan.steps_for([("stage1", CFG, "")])
    finished(steps[-1], 60)
    other = plan.steps_for([("stage1", dataclasses.replace(CFG, seed=1, stage1_steps=8), "")])
    assert plan.estimates(other)[other[-1].folder].seconds == 120  # twice the updates
    assert plan.estimates(other)[other[0].folder] == plan.Estimate()
    wider = plan.steps_for([("stage1", dataclasses.replace(CFG, image_size=96), "")])
    assert plan.estimates(wider)[wider[-1].folder].seconds is None  # another kind of image
    main(
        [
            "train",
            "--preset",
            "smoke",
            "--until",
            "stage1",
            "--set",
            "threads=1",
            "--set",
            "seed=1",
            "--dry-run",
        ]
    )
    assert (
        "4 phases, none finished; about 60 s to go, and 3 phases of unknown length" in capsys.readouterr().out
    )


def test_somebody_who_has_run_nothing_yet_is_told_the_times_of_another_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VALOR_FIGURES", str(tmp_path))
    steps = plan.steps_for([("stage1", CFG, "")])
    studies = plan.studies_of(CFG)
    *kind, _, processes = plan._kind("stage1", dataclasses.asdict(CFG), "another CPU", 1)
    row = dict(phase="stage1", seconds=30.0, memory=10**9, disk=10**6)
    row |= dict(work=plan.work_of("stage1", CFG, studies) / 2, kind=json.dumps([*kind, "", processes]))
    pd.DataFrame([row]).to_csv(tmp_path / "phase_times.csv", index=False)
    found = plan.estimates(steps)[steps[-1].folder]
    assert found.seconds == 60 and found.elsewhere
    plan.print_plan([("stage1", CFG, "")])
    assert "as on another machine, one thread each (figures/phase_times.csv)" in capsys.readouterr().out
    finished(steps[-1], 5)
    other = plan.steps_for([("stage1", dataclasses.replace(CFG, seed=1), "")])
    assert plan.estimates(other)[other[-1].folder][:1] == (5,)  # what ended here tells more


def test_a_resumed_phase_tells_nothing(runs):
    steps = plan.steps_for([("stage1", CFG, "")])
    finished(steps[-1], 60, resumed=True)
    assert plan.past_phases() == []


def test_a_policy_of_known_shape_is_counted_by_the_measured_step(runs, tmp_path, capsys):
    llava_med_7b().save_pretrained(tmp_path / "llava")
    main(
        [
            "train",
            "--preset",
            "paper",
            "--set",
            f"base={tmp_path / 'llava'}",
            "--set",
            "n_train=800",
            "--dry-run",
        ]
    )
    said = capsys.readouterr().out
    hours = float(re.search(r"GPU-hours: ([\d.]+)", said)[1])
    assert 0.8 < hours < 1.1 and "memory of the GPU at the peak: 41.4 GB" in said  # 600 steps of 5.3 s
    assert "measured on an H200" in said


def test_lines_of_a_job_stay(runs, capsys):
    "Each phase that is made ends in a line; the job's file has what `valor watch` needs."
    with plan.job([("sft", CFG, "")], "trial"):
        phases.ensure("data", CFG)
        said = capsys.readouterr().out
        assert re.search(r"^3 phases, none finished", said, re.M)
        assert re.search(r"^step 1 of 3: data took .* s; next is base$", said, re.M), said
    kept = json.loads((runs_dir() / "jobs" / "trial.json").read_text())
    assert [s["label"] for s in kept["steps"]] == ["data", "base", "sft"]
    assert phases.LISTENERS == []
    cost = json.loads((phases.phase_folder("data", CFG) / "done.json").read_text())["cost"]
    assert cost["seconds"] > 0 and not cost["resumed"] and cost["memory"] > 0
    phases.ensure("data", CFG)
    assert capsys.readouterr().out == ""  # finished, and no job
