"""The checkpoint that is evaluated, chosen on validation studies by a named measure; off by default."""

import dataclasses
import json

import pandas as pd
import pytest
from test_ways_out import mine

from valor.cli import main
from valor.config import preset
from valor.contents import fingerprint_once
from valor.runs import makers
from valor.runs.makers import note_of, read_reports
from valor.runs.phases import chooses, ensure, fields_reaching, phase_folder, phase_key
from valor.runs.processes import RunError


def test_by_default_no_key_and_no_note_changes():
    cfg = preset("smoke")
    chosen = dataclasses.replace(cfg, choose_by="label micro F1")
    for name in ("sft", "stage1", "stage2", "progress_stage2", "eval_sft", "controls"):
        assert phase_key(name, cfg) == phase_key(name, chosen), name
    for name in ("eval_stage1", "eval_stage2", "erased_stage2"):
        assert phase_key(name, cfg) != phase_key(name, chosen) and chooses(name, chosen)
        assert "choose_by" not in fields_reaching(name, cfg) and "eval_studies" not in fields_reaching(
            name, cfg
        )
    assert "checkpoint" not in makers.scorers_note(cfg)
    assert "chosen by label micro F1 on 8 validation studies" in makers.scorers_note(chosen)


def test_the_best_snapshot_on_validation_studies_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    cfg = preset("smoke", choose_by="ROUGE-L")
    progress = pd.read_csv(ensure("progress_stage2", cfg) / "progress.csv")
    folder = ensure("eval_stage2", cfg)
    said = json.loads((folder / "chosen.json").read_text())
    best = progress.loc[progress["ROUGE-L"].idxmax(), "k"]
    assert said == dict(by="ROUGE-L", k=int(best)) and len(progress) > 1
    # an update that was not the last one gives other reports than the last one
    worst = int(progress.loc[progress["ROUGE-L"].idxmin(), "k"])
    monkeypatch.setattr(makers, "best_update", lambda table, metric: worst)
    other = dataclasses.replace(cfg, choose_by="BLEU-1")
    assert json.loads((ensure("eval_stage2", other) / "chosen.json").read_text())["k"] == worst
    reports = [read_reports(phase_folder("eval_stage2", c), "test") for c in (cfg, other)]
    assert reports[0] != reports[1]
    assert "checkpoint of each stage chosen by ROUGE-L" in note_of(cfg)
    assert not (ensure("eval_sft", cfg) / "chosen.json").exists()


@pytest.mark.parametrize("by", ["words", "accuracy", "label F1"])
def test_a_measure_that_cannot_choose_is_one_line_before_anything_is_trained(by, tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    with pytest.raises(SystemExit, match="choose_by=") as end:
        main(["run", "--preset", "smoke", "--set", f"choose_by={by}"])
    assert "label micro F1" in str(end.value) and "\n" not in str(end.value)
    assert not (tmp_path / "runs").exists()


def test_studies_without_a_validation_split_are_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VALOR_CACHE", str(tmp_path / "cache"))
    cfg = dataclasses.replace(mine(tmp_path), choose_by="ROUGE-L")
    with pytest.raises(RunError, match="no study in the split 'val'"):
        ensure("eval_stage2", cfg)
    assert [p.name.split("-")[0] for p in (tmp_path / "runs").iterdir() if p.is_dir()] == ["data"]


def test_a_chexbert_edited_in_place_changes_every_evaluation_that_a_choice_reaches(tmp_path, monkeypatch):
    "Also the evaluations of erased images, whose own fields do not name it: stage 1 does, and comes before."
    monkeypatch.setenv("VALOR_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "chexbert.pth"
    weights.touch()
    cfg = preset("smoke", choose_by="BLEU-4", chexbert=str(weights))
    names = ("eval_stage1", "eval_stage2", "erased_stage1", "erased_stage2")

    def keys(held):
        weights.write_text(held)
        fingerprint_once.cache_clear()
        return [phase_key(name, cfg) for name in names]

    before, after = keys("1"), keys("22")
    fingerprint_once.cache_clear()
    assert all(old != new for old, new in zip(before, after))
