"""CheXpert Plus, PadChest and ReXGradient in their distributors' layouts, and tables by view, sex and age."""

import json
import shutil

import numpy as np
import pytest
import trees
from PIL import Image

from valor.config import preset
from valor.data.sources import DataError
from valor.data.studies import load_studies
from valor.metrics import statistics as ev
from valor.metrics.groups import group_section, groups_of
from valor.runs.makers import real_data
from valor.vocabulary import OBSERVATIONS

N = 12
BUILT = dict(chexpert_plus=trees.chexpert_plus, padchest=trees.padchest, rexgradient=trees.rexgradient)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    home = tmp_path_factory.mktemp("large")
    return {name: build(home / name, N) for name, build in BUILT.items()}


def rows_of(source, root, tmp_path, **how):
    studies = load_studies(source, root, cache=tmp_path / "cache", size=32, **how)
    return {row["study_id"]: row for part in studies.values() for row in part}, studies


@pytest.mark.parametrize("source", BUILT)
def test_who_was_examined_and_how_reaches_the_studies(source, roots, tmp_path):
    rows, studies = rows_of(source, roots[source], tmp_path)
    assert len(rows) == N and not len(studies.set_aside)
    assert {row["view"] for row in rows.values()} == {"frontal"}
    assert {row["position"] for row in rows.values()} >= {"PA"} and {row["sex"] for row in rows.values()} == {
        "F",
        "M",
    }
    assert all(20 <= row["age"] <= 85 for row in rows.values())


def test_splits_are_the_distributors_and_no_patient_is_in_two(roots, tmp_path):
    rows, studies = rows_of("chexpert_plus", roots["chexpert_plus"], tmp_path)
    assert {r["study_id"] for r in studies["test"]} == {f"patient{i // 2:05d}-study{i}" for i in (4, 8, 12)}
    rows, _ = rows_of("chexpert_plus", roots["chexpert_plus"], tmp_path, options=dict(valid="val"))
    assert {r["split"] if "split" in r else "" for r in rows.values()} <= {"train", "val", ""}
    _, rex = rows_of("rexgradient", roots["rexgradient"], tmp_path)
    assert {split: len(part) for split, part in rex.items()} == {"train": 4, "val": 4, "test": 4}
    _, pad = rows_of("padchest", roots["padchest"], tmp_path)
    patients = [set(part["patient_id"]) for part in pad.values()]
    assert sum(map(len, patients)) == len(set.union(*patients))


def test_labels_are_the_distributors_where_they_are_asked_for(roots, tmp_path):
    effusion = OBSERVATIONS.index("Pleural Effusion")
    by_rules, _ = rows_of("chexpert_plus", roots["chexpert_plus"], tmp_path)
    given, _ = rows_of("chexpert_plus", roots["chexpert_plus"], tmp_path, labels="chexpert")
    assert all(row["labels"][effusion] == 1 and sum(row["labels"]) == 1 for row in given.values())
    assert any(row["labels"][effusion] == 0 for row in by_rules.values())
    pad, _ = rows_of("padchest", roots["padchest"], tmp_path)
    named = {i: [o for o, v in zip(OBSERVATIONS, row["labels"]) if v] for i, row in pad.items()}
    assert named["1001"] == ["No Finding"] and named["1003"] == ["Pleural Effusion"]
    assert set(named["1002"]) == {"Cardiomegaly", "Support Devices"}


def test_padchest_in_english_and_in_spanish(roots, tmp_path):
    english, _ = rows_of("padchest", roots["padchest"], tmp_path)
    assert "shows pleural effusion" in english["1003"]["report"] and "left basal" in english["1003"]["report"]
    assert "is normal" in english["1001"]["report"]
    spanish, _ = rows_of("padchest", roots["padchest"], tmp_path, options=dict(texts="report"), min_words=1)
    assert all("derram" in row["report"] for row in spanish.values())


@pytest.mark.parametrize(
    "source, options, says",
    [
        ("padchest", dict(texts="english"), "expected 'labels' \\(English\\) or 'report'"),
        ("chexpert_plus", dict(valid="none"), "expected 'test' or 'val'"),
    ],
)
def test_a_wrong_option_is_one_line(source, options, says, roots, tmp_path):
    with pytest.raises(DataError, match=says):
        rows_of(source, roots[source], tmp_path, options=options)


@pytest.mark.parametrize(
    "source, says",
    [
        ("padchest", "PADCHEST_chest_x_ray"),
        ("rexgradient", "no metadata in it"),
        ("chexpert_plus", "no df_chexpert_plus_240401.csv"),
    ],
)
def test_another_folder_is_one_line(source, says, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=says):
        rows_of(source, tmp_path / "empty", tmp_path)


def test_a_study_that_cannot_be_used_is_set_aside(tmp_path):
    root = trees.padchest(tmp_path / "pad", N)
    table = root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    rows = trees.read_csv(table)
    rows[0]["Labels"] = rows[1]["Labels"] = "['exclude']"
    rows[2]["Labels"] = rows[3]["Labels"] = "broken"
    trees.write_csv(table, rows)
    kept, studies = rows_of("padchest", root, tmp_path)
    assert len(kept) == N - 2 and set(studies.set_aside.kind) == {"excluded", "broken labels"}
    root = trees.rexgradient(tmp_path / "rex", N)
    path = root / "metadata/train_metadata_view_position.json"
    entries = json.loads(path.read_text())
    entries[next(iter(entries))]["ImageViewPosition"] = ["PA"]
    path.write_text(json.dumps(entries))
    kept, studies = rows_of("rexgradient", root, tmp_path)
    assert len(kept) == N - 1 and set(studies.set_aside.kind) == {"views do not fit"}


def test_tables_by_view_sex_and_age(roots, tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_CACHE", str(tmp_path / "cache"))
    cfg = preset("smoke", benchmark="rexgradient", data_root=str(roots["rexgradient"]), n_test=None)
    (tmp_path / "out").mkdir()
    test = real_data(tmp_path / "out", cfg)["test"]  # what a run keeps of the studies
    assert set(groups_of(test)) == {"view", "sex"}  # all four are under 40
    frames = {"same": {0: ev.score_reports(list(test["report"]), test, "rexgradient")}}
    text, table = group_section(frames, test, ["ROUGE-L"], 50)
    assert text.startswith("By view, sex and age") and "| sex" in text
    counts = table.set_index("part").studies
    assert counts["F"] + counts["M"] == len(test) and (table.value == 1).all()
    assert set(table.part) == {"AP", "PA", "F", "M"}


def test_a_table_of_ones_own_may_state_view_sex_and_age(tmp_path):
    rows = ["image,view,report,split,age,sex"]
    for i, (view, age, sex) in enumerate([("AP", 30, "F"), ("PA", 70, "male"), ("frontal", "", "")]):
        Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32) + i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{view},The lungs are clear and the heart is normal.,test,{age},{sex}")
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    _, studies = rows_of("table", tmp_path / "mine.csv", tmp_path)
    test = studies["test"]
    assert (test["age"], test["sex"], test["position"]) == (
        [30, 70, None],
        ["F", "M", None],
        ["AP", "PA", None],
    )


def test_an_image_that_was_missing_is_read_once_it_is_there(tmp_path):
    rows = ["image,view,report,split"]
    rows += [f"{i}.png,PA,The lungs are clear and the heart is normal.,test" for i in range(2)]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)).save(tmp_path / "0.png")
    kept, studies = rows_of("table", tmp_path / "mine.csv", tmp_path)
    assert len(kept) == 1 and list(studies.set_aside.kind) == ["missing image", "no image of the view"]
    shutil.copy(tmp_path / "0.png", tmp_path / "1.png")
    kept, studies = rows_of("table", tmp_path / "mine.csv", tmp_path)
    assert len(kept) == 2 and studies.set_aside.empty


def test_chexpert_plus_states_the_indication(roots, tmp_path):
    rows, _ = rows_of("chexpert_plus", roots["chexpert_plus"], tmp_path, context=["indication"])
    assert {row["context"]["indication"] for row in rows.values()} == {"cough.", None}
