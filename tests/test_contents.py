"""What is read from disk is part of a key: a table, a report or weights that were edited in place are
never taken for what they were."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import trees

from valor.config import preset
from valor.contents import fingerprint, fingerprint_once
from valor.data.studies import load_studies
from valor.runs import phases
from valor.runs.phases import begin, phase_config, phase_folder, phase_key


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VALOR_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "runs"
    fingerprint_once.cache_clear()


def keys(cfg, *names):
    "The phases' keys as a new process finds them."
    fingerprint_once.cache_clear()
    return [phase_key(n, cfg) for n in names]


EDITS = {
    "a table grows": (
        "table",
        lambda r: (r.parent / "mine.csv").write_text(
            r.read_text() + "new,p,img/1.png;img/1.jpg,PA;LATERAL,train,,A long enough text here,More\n"
        ),
    ),
    "a word of a table is corrected, its size kept": (
        "table",
        lambda r: r.write_text(r.read_text().replace("small", "large", 1).replace("Small", "Large", 1)),
    ),
    "a report below the root": (
        "mimic_cxr_jpg",
        lambda r: (r / "files/p10/p10000001/s50000003.txt").write_text(
            "FINDINGS: The lungs are clear today.\n IMPRESSION: Clear."
        ),
    ),
    "an XML below the root": (
        "openi",
        lambda r: (r / "ecgen-radiology/3.xml").write_text(
            (r / "ecgen-radiology/3.xml").read_text().replace("effusion", "oedemata", 1)
        ),
    ),
    "an annotation": (
        "r2gen_iu",
        lambda r: (r / "annotation.json").write_text(
            (r / "annotation.json").read_text().replace("normal", "greater", 1)
        ),
    ),
    "a film of another size": (
        "r2gen_iu",
        lambda r: trees.film(r / "images/CXR4_IM-0004/0.png", 77, size=(80, 80)),
    ),
}
MAKE = {"table": trees.table, "mimic_cxr_jpg": trees.mimic, "openi": trees.openi, "r2gen_iu": trees.r2gen}


@pytest.mark.parametrize("name", EDITS)
def test_data_edited_in_place_are_other_data(name, runs, tmp_path):
    source, edit = EDITS[name]
    root = MAKE[source](tmp_path / "data")
    cfg = preset("smoke", benchmark=source, data_root=str(root))
    before, index = keys(cfg, "data", "base", "stage2"), load_studies(source, root).folder
    assert keys(cfg, "data", "base", "stage2") == before and load_studies(source, root).folder == index
    edit(root)
    assert not set(keys(cfg, "data", "base", "stage2")) & set(before)
    assert load_studies(source, root).folder != index


@pytest.mark.parametrize(
    "field, phase",
    [
        ("base", "base"),
        ("expert", "expert"),
        ("chexbert", "controls"),
        ("radgraph", "stage1"),
        ("bertscore_model", "stage1"),
        ("radgraph_encoder", "stage1"),
    ],
)
def test_other_weights_in_the_same_folder_are_another_phase(field, phase, runs, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"0" * 100)
    cfg = dataclasses.replace(preset("smoke"), **{field: str(folder)})
    before = keys(cfg, phase)
    (folder / "model.safetensors").write_bytes(b"1" * 100)
    assert keys(cfg, phase) != before


def test_files_of_pairs_splits_and_reports_count(runs, tmp_path):
    for name in ("pairs.json", "splits.csv"):
        (tmp_path / name).write_text("1")
    (tmp_path / "reports").mkdir()
    cfg = preset(
        "smoke",
        benchmark="mimic_cxr_jpg",
        data_root=str(tmp_path),
        dpo_pairs=str(tmp_path / "pairs.json"),
        data_options=dict(
            splits=str(tmp_path / "splits.csv"), options=dict(reports=str(tmp_path / "reports"))
        ),
    )
    first = keys(cfg, "data", "samples")
    (tmp_path / "pairs.json").write_text("2")
    assert keys(cfg, "samples") != first[1:]
    fields = phase_config("data", cfg)["fields"]
    told = (
        fields["data_root"],
        fields["data_options"]["splits"],
        fields["data_options"]["options"]["reports"],
    )
    assert all(value.startswith("holds ") for value in told)
    assert str(tmp_path) not in json.dumps([phase_config(name, cfg) for name in phases.PHASES])


def test_a_run_is_found_again_when_its_data_and_weights_have_moved(runs, tmp_path):
    for name in ("films/1.png", "base/model.safetensors", "expert/open_clip_config.json"):
        path = tmp_path / "old" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(model_cfg=dict(text_cfg={}, vision_cfg={}))))

    def keys_at(home):
        at = dict(data_root=str(home / "films"), base=str(home / "base"), expert=str(home / "expert"))
        return keys(preset("smoke", benchmark="r2gen_iu", **at), "data", "expert", "sft", "stage2")

    before = keys_at(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert keys_at(tmp_path / "new") == before


def test_embedded_runs_keep_their_keys(runs):
    "What no path reaches has no fingerprint: runs that were made before are still found."
    for phase in phases.PHASES:
        assert "holds " not in json.dumps(phase_config(phase, preset("smoke")))


@pytest.mark.parametrize("expert", ["embedded", "embedded-labels"])
@pytest.mark.parametrize("benchmark", ["phantom", "openi_rendered", "r2gen_iu"])
def test_only_the_expert_that_tells_films_apart_by_their_reports_has_another_key(
    runs, tmp_path, benchmark, expert
):
    root = dict(data_root=str(trees.r2gen(tmp_path / "data"))) if benchmark == "r2gen_iu" else {}
    cfg = preset("smoke", benchmark=benchmark, expert=expert, **root)
    concerned = benchmark == "r2gen_iu" and expert == "embedded"
    assert phase_config("expert", cfg).get("apart") == ("by report" if concerned else None)
    for phase in set(phases.PHASES) - {"expert"}:
        assert "apart" not in phase_config(phase, cfg)


def test_a_run_whose_source_is_gone_is_still_found(runs, tmp_path):
    root = trees.r2gen(tmp_path / "data")
    cfg = preset("smoke", benchmark="r2gen_iu", data_root=str(root))
    runs.mkdir()
    begin(phase_folder("data", cfg), phase_config("data", cfg), cfg)
    shutil.rmtree(root)
    fingerprint_once.cache_clear()
    assert (phase_folder("data", cfg) / "config.json").exists()


def test_runs_and_caches_below_the_root_do_not_count(runs, tmp_path):
    (tmp_path / "table.csv").write_text("1")
    before = fingerprint(tmp_path)
    for folder in ("runs", "cache"):
        (tmp_path / folder / "x").mkdir(parents=True)
        (tmp_path / folder / "x" / "y.json").write_text("{}")
    assert fingerprint(tmp_path) == before
