"""Phantoms whose references leave findings out: what each part of a run may know, whose seed it follows, and
what can stand in the expert's place."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from valor.config import preset
from valor.data.benchmarks import load_benchmark
from valor.data.phantom import from_truth, is_subtle, make_phantom, parse_report
from valor.results import tables
from valor.runs import makers, systems
from valor.runs.phases import phase_key

BEFORE = dict(omit=0.0, expert="embedded")  # as phantom was before references left anything out


def test_without_omission_the_studies_are_those_of_before_byte_for_byte():
    digest = hashlib.sha256()
    for split in load_benchmark("phantom", 6, 2, 2, size=64).values():
        for row in split.cast_column("image", split.features["image"].__class__(decode=False)):
            digest.update(row["image"]["bytes"] + json.dumps({**row, "image": None}).encode())
    assert digest.hexdigest() == "e6f82bdec068d90259081e3d0e678a1e5b07540cdd9a5b0d8611f2b37fb89aa6"


def test_without_omission_phases_keep_their_keys():
    cfg = preset("smoke", **BEFORE)
    keys = {name: phase_key(name, cfg) for name in ("data", "expert", "base", "sft", "stage1", "stage2")}
    assert keys == {
        "data": "data-92225e8ab743",
        "expert": "expert-942c27e8af58",
        "base": "base-ae411abbf0f2",
        "sft": "sft-c3420e065157",
        "stage1": "stage1-10706b16cd9c",
        "stage2": "stage2-ff8f1820cb34",
    }


@pytest.mark.parametrize("omit", [0.2, 0.4, 0.6])
def test_references_leave_out_what_they_say_and_subtle_findings_more_often(omit):
    studies = make_phantom(1500, seed=5, split="train", size=32, omit=omit)
    left = dict.fromkeys((True, False), 0)
    planted = dict.fromkeys((True, False), 0)
    for row in studies.remove_columns("image"):
        stated = {f.where for f in parse_report(row["report"])}
        truth = from_truth(row["truth"])
        assert stated <= {f.where for f in truth}
        for finding in truth:
            planted[is_subtle(finding)] += 1
            left[is_subtle(finding)] += finding.where not in stated
    assert sum(left.values()) / sum(planted.values()) == pytest.approx(omit, abs=0.03)
    assert left[True] / planted[True] > left[False] / planted[False] + 0.1


def test_only_training_references_leave_findings_out():
    data = load_benchmark("phantom", 60, 20, 20, size=32, omit=0.4)
    complete = {
        split: [
            {f.where for f in parse_report(r["report"])} == {f.where for f in from_truth(r["truth"])}
            for r in d
        ]
        for split, d in data.items()
    }
    assert all(complete["val"]) and all(complete["test"]) and not all(complete["train"])


def test_the_seed_drives_data_base_and_expert_unless_theirs_is_given():
    first, second = preset("smoke"), preset("smoke", seed=1)
    for name in ("data", "base", "expert", "sft", "controls"):
        assert phase_key(name, first) != phase_key(name, second)
    given = dict(data_seed=0, base_seed=0, expert_seed=101)
    for name in ("data", "base", "expert", "controls"):
        assert phase_key(name, first) == phase_key(name, preset("smoke", seed=1, **given))


def test_the_base_is_told_no_more_than_the_references(monkeypatch, tmp_path):
    seen = {}
    train = load_benchmark("phantom", 40, 1, 1, size=64, omit=0.4)["train"]
    monkeypatch.setattr(makers, "load_data", lambda folder: dict(train=train))
    monkeypatch.setattr(makers, "build_policy", lambda *a, **k: (None, None))
    monkeypatch.setattr(
        makers, "warm_up_vision", lambda m, p, images, targets, *a, **k: seen.update(targets=targets)
    )
    monkeypatch.setattr(makers, "save_policy", lambda m, p, out: out.mkdir(parents=True))
    monkeypatch.setattr(makers, "sft", lambda *a, **k: None)
    makers.make_base(tmp_path, preset("smoke"), dict(data=tmp_path), "base")
    stated = sum(len({(f.name, f.side, f.zone) for f in parse_report(r)}) for r in train["report"])
    assert seen["targets"].sum() == stated < sum(map(len, train["truth"]))


class Bright:
    "An expert that likes a report as well as its image is bright; it is never asked about its context."

    counts = False

    def similarity(self, images, texts):
        return torch.tensor([float(np.asarray(image).mean()) for image in images])


@pytest.mark.parametrize("visual", ["expert", "placebo", "random", "truth"])
def test_stage_2_is_rewarded_by_what_the_configuration_names(visual, monkeypatch, tmp_path):
    train = make_phantom(6, 0, "train", size=64)
    given = {}
    (tmp_path / "log.csv").write_text("k\n1\n")
    monkeypatch.setattr(makers, "load_data", lambda folder: dict(train=train))
    monkeypatch.setattr(makers, "phase_folder", lambda name, cfg: tmp_path)
    monkeypatch.setattr(makers, "open_expert", lambda folder, cfg: Bright())
    monkeypatch.setattr(makers, "text_scorers", lambda cfg: {})
    monkeypatch.setattr(makers, "write_card", lambda adapter: None)
    monkeypatch.setattr(makers, "align", lambda *a, **k: given.update(rewards=a[3]) or [])
    cfg = preset("smoke", visual=visual)
    makers.make_stage(tmp_path, cfg, dict(expert=tmp_path, stage1=tmp_path), "stage2")
    rows, texts = list(train), train["report"][:]
    scores = given["rewards"].row_functions["similarity"](texts, rows)
    own = Bright().similarity(train["image"], texts).tolist()
    if visual == "expert":
        assert scores == own
    elif visual == "placebo":
        assert scores != own and sorted(scores) == sorted(own)
    elif visual == "random":
        assert len(set(scores)) == 6 and max(scores) < 1
    else:
        assert scores == [1.0] * 6


def test_planted_truth_is_no_row_where_nothing_was_planted():
    assert "VALOR, planted truth" in systems.systems_on("phantom")
    assert "VALOR, planted truth" not in systems.systems_on("r2gen_iu")
    real = SimpleNamespace(benchmark="r2gen_iu")
    with pytest.raises(ValueError, match="nobody planted"):
        systems.phase_of("VALOR, planted truth", real)


def test_each_seed_is_scored_on_its_own_references(monkeypatch):
    cfgs = [preset("smoke", seed=s) for s in (3, 4)]
    tests = {phase_key("data", c): dict(test=dict(report=[f"report of seed {c.seed}"])) for c in cfgs}
    monkeypatch.setattr(tables, "load_data", lambda folder: tests[Path(folder).name])
    references = tables.references_of(cfgs)
    assert references[4] == ["report of seed 4"] and references[None] == ["report of seed 3"]
