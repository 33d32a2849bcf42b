"""Real-data loading: trees in every distributor's layout load whole; over sixty kinds of fault cost at
most the study they are in."""

import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import trees

from valor.config import preset
from valor.data.benchmarks import code_labels
from valor.data.images import ImageError, check_image, read_image
from valor.data.report import data_report, to_markdown
from valor.data.sections import parse_sections
from valor.data.sources import SOURCES, DataError, Study, terms_of
from valor.data.studies import load_studies, store_images
from valor.data.views import drawn_film, picture_view, views_of
from valor.vocabulary import OBSERVATIONS

N = 12
LAYOUTS = {  # name: (source, builder returning the root, changes that make every study usable)
    "openi png": ("openi", lambda r: trees.openi(r, N), {}),
    "openi dicom": ("openi", lambda r: trees.openi(r, N, "dcm"), {}),
    "kaggle": ("kaggle_indiana", lambda r: trees.kaggle(r, N), {}),
    "r2gen iu": ("r2gen_iu", lambda r: trees.r2gen(r, N), {}),
    "r2gen iu flat": ("r2gen_iu", lambda r: trees.r2gen(r, N, flat=True), {}),
    "r2gen mimic": ("r2gen_mimic", lambda r: trees.r2gen(r, N, mimic=True), {}),
    "mimic": ("mimic_cxr_jpg", lambda r: trees.mimic(r, N), {}),
    "chexpert plus": ("chexpert_plus", lambda r: trees.chexpert_plus(r, N), {}),
    "padchest": ("padchest", lambda r: trees.padchest(r, N), {}),
    "rexgradient": ("rexgradient", lambda r: trees.rexgradient(r, N), {}),
    "csv": ("table", lambda r: trees.table(r, N), {}),
    "jsonl": ("table", lambda r: trees.table(r, N, "jsonl"), {}),
}


@pytest.fixture(scope="module")
def masters(tmp_path_factory):
    "Every tree, made once; tests copy what they break."
    home = tmp_path_factory.mktemp("trees")
    return {name: LAYOUTS[name][1](home / name.replace(" ", "_")) for name in LAYOUTS}


def loaded(name, root, tmp_path, **kw):
    return load_studies(LAYOUTS[name][0], root, cache=tmp_path / "cache", **kw)


def ids(studies):
    return {i for d in studies.values() for i in d["study_id"]}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_loads_whole(name, masters, tmp_path):
    studies = loaded(name, masters[name], tmp_path, size=48)
    assert len(ids(studies)) == N and len(studies.set_aside) == 0
    for data in studies.values():
        for row in data:
            assert (
                row["image"].size == (48, 48)
                and row["image"].mode == "L"
                and len(row["labels"]) == 14
                and row["report"]
                and row["source"] == LAYOUTS[name][0]
            )
            assert (
                "xxxx" not in row["report"]
                and "___" not in row["report"]
                and row["report"] == row["report"].lower()
            )
            if "r2gen" not in name and name != "padchest":
                assert row["findings"] and row["impression"] and row["report"].startswith("findings: ")
    assert "Set aside" in to_markdown(data_report(studies))


@pytest.mark.parametrize("name", ["kaggle", "mimic", "csv"])
def test_second_image(name, masters, tmp_path):
    both = loaded(name, masters[name], tmp_path, view="both", size=32)
    rows = [r for d in both.values() for r in d]
    assert len(rows) == (8 if name == "mimic" else N) and all(
        r["view"] == "frontal" and r["second_view"] == "lateral" and r["second_image"].size == (32, 32)
        for r in rows
    )


def test_mimic_splits_labels_patients(masters, tmp_path):
    studies = loaded("mimic", masters["mimic"], tmp_path)
    assert {s: len(d) for s, d in studies.items()} == {"train": 4, "val": 4, "test": 4}  # validate is val
    positive = {r["study_id"]: r["labels"][9] for d in studies.values() for r in d}
    assert all(
        positive[f"s{50000000 + i}"] == (i % 3 != 1) for i in range(1, N + 1)
    )  # 1 and -1 count as present
    assert not data_report(studies)["Leakage"]["patients"].any()


def test_r2gen_preset(masters, tmp_path):
    studies = loaded("r2gen iu", masters["r2gen iu"], tmp_path, preset="r2gen", size=32)
    row = studies["test"][0]
    assert (
        row["report"].endswith(" .")
        and "," not in row["report"]
        and row["second_image"] is not None
        and row["second_view"] == "unknown"
    )


def test_one_image_a_study_as_mmedpo_has_it(masters, tmp_path):
    "`view='first'`: R2Gen's studies, all of them, each with the first of its images whatever its view."
    two, one = (
        loaded("r2gen iu", masters["r2gen iu"], tmp_path, preset="r2gen", view=v, size=32)
        for v in ("listed", "first")
    )
    assert {s: list(d["study_id"]) for s, d in one.items()} == {
        s: list(d["study_id"]) for s, d in two.items()
    }
    for split in one:
        for single, pair in zip(one[split], two[split]):
            assert single["second_image"] is None and pair["second_image"] is not None
            assert single["image"].tobytes() == pair["image"].tobytes()


def test_hugging_face_dataset(tmp_path):
    image = Image.fromarray(drawn_film("frontal", (40, 30)))
    rows = dict(image=[image] * 4, report=[f"The heart is normal in size {i}." for i in range(4)])
    part = datasets.Dataset.from_dict(
        rows, features=datasets.Features(image=datasets.Image(), report=datasets.Value("string"))
    )
    datasets.DatasetDict(train=part, validation=part.select([0])).save_to_disk(tmp_path / "hf")
    studies = load_studies("hf", tmp_path / "hf", sections="report", cache=tmp_path / "cache", size=32)
    assert {s: len(d) for s, d in studies.items()} == {"train": 4, "val": 1} and studies["train"][0][
        "image"
    ].size == (32, 32)


def test_split_file(masters, tmp_path):
    (tmp_path / "s.csv").write_text(
        "study_id,split\n"
        + "\n".join(f"CXR{i},{'test' if i < 4 else 'train'}" for i in range(1, N + 1))
        + "\nCXR999,test\n"
    )
    studies = loaded("kaggle", masters["kaggle"], tmp_path, splits=tmp_path / "s.csv")
    assert sorted(studies["test"]["study_id"]) == [
        "CXR1",
        "CXR2",
        "CXR3",
    ] and studies.set_aside.kind.tolist() == ["absent study"]


# ---- faults
# --------------------------------------------------------------------------------------------------


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def rows(path, change):
    found = trees.read_csv(path)
    trees.write_csv(path, change(found) or found)


def entries(root, change):
    path = root / "annotation.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def set_(rows, i, **values):
    rows[i].update(values)


png, norm = "NLMCXR_png/CXR3_1_IM-0003-1001.png", "images/images_normalized/3_IM-0003-1001.dcm.png"
second = "NLMCXR_png/CXR3_1_IM-0003-2001.png"
xml = "ecgen-radiology/3.xml"
jpg = "files/p10/p10000001/s50000003/00000003-00000000-aaaa-bbbb-cccc.jpg"
txt = "files/p10/p10000001/s50000003.txt"


def cut(f, keep=0.5):
    return f.write_bytes(f.read_bytes()[: int(f.stat().st_size * keep)])


def flip(f, at):
    return f.write_bytes(f.read_bytes()[:at] + b"\0\0\0\0" + f.read_bytes()[at + 4 :])


def lone(r):
    return edit(r / "ecgen-radiology/3.xml", '<parentImage id="CXR3_1_IM-0003-2001">', "<other>", 1) or edit(
        r / "ecgen-radiology/3.xml", "</parentImage></eCitation>", "</other></eCitation>"
    )


meta, spl, chx = (f"mimic-cxr-2.1.0-{n}.csv.gz" for n in ("metadata", "split", "chexpert"))
LOST = {
    "openi png": "CXR3",
    "openi dicom": "CXR3",
    "kaggle": "CXR3",
    "r2gen iu": "CXR3_IM-0003",
    "mimic": "s50000003",
    "csv": "study3",
    "jsonl": "study3",
}

FAULTS = {  # "layout: what": (what is done to the tree, kind that is listed, whether the study is lost)
    # Open-i
    "openi png: XML cut": (lambda r: cut(r / xml), "broken XML", True),
    "openi png: XML empty": (lambda r: (r / xml).write_bytes(b""), "broken XML", True),
    "openi png: XML is something else": (lambda r: (r / xml).write_text("<html/>"), "broken XML", True),
    "openi png: XML with a bare ampersand": (
        lambda r: edit(r / xml, "Cough.", "Cough & fever."),
        "broken XML",
        True,
    ),
    "openi png: XML in a wrong encoding": (
        lambda r: (r / xml).write_bytes((r / xml).read_bytes().replace(b"Cough", b"\xff\xfe")),
        "broken XML",
        True,
    ),
    "openi png: uId without id": (lambda r: edit(r / xml, 'id="CXR3"', 'nr="CXR3"'), "broken XML", True),
    "openi png: no FINDINGS": (
        lambda r: edit(r / xml, 'Label="FINDINGS"', 'Label="OTHER"'),
        "no findings",
        True,
    ),
    "openi png: empty IMPRESSION": (lambda r: edit(r / xml, trees.IMPRESSION[0], ""), "no impression", True),
    "openi png: findings are nothing but marks": (
        lambda r: edit(r / xml, trees.FINDINGS[0].format(i=3), "XXXX."),
        "no findings",
        True,
    ),
    "openi png: findings of one word": (
        lambda r: edit(r / xml, trees.FINDINGS[0].format(i=3), "Clear."),
        "too short",
        True,
    ),
    "openi png: duplicate id": (
        lambda r: shutil.copy(r / xml, r / "ecgen-radiology/77.xml"),
        "duplicate id",
        False,
    ),
    "openi png: no MeSH code": (
        lambda r: edit(r / xml, f"<major>{trees.MESH[0][0]}</major>", ""),
        "no labels",
        True,
    ),
    "openi png: not indexed": (lambda r: edit(r / xml, trees.MESH[0][0], "No Indexing"), "no labels", True),
    "openi png: one of two PNGs is missing": (lambda r: (r / png).unlink(), "missing image", False),
    "openi png: one of two PNGs is cut": (lambda r: cut(r / png), "damaged image", False),
    "openi png: one of two PNGs is empty": (lambda r: (r / png).write_bytes(b""), "damaged image", False),
    "openi png: one of two PNGs is of one value": (
        lambda r: Image.new("L", (60, 50), 9).save(r / png),
        "flat image",
        False,
    ),
    "openi png: one of two PNGs is black": (
        lambda r: Image.new("L", (600, 500), 0).save(r / png),
        "flat image",
        False,
    ),
    "openi png: a PNG is HTML": (lambda r: (r / png).write_text("<html>404</html>"), "damaged image", False),
    "openi png: a PNG is a GIF": (
        lambda r: Image.new("L", (9, 9)).save(r / png, "GIF"),
        "damaged image",
        False,
    ),
    "openi png: a PNG is a folder": (
        lambda r: (r / png).unlink() or (r / png).mkdir(),
        "damaged image",
        False,
    ),
    "openi png: both PNGs are missing": (
        lambda r: (r / png).unlink() or (r / second).unlink(),
        "no image of the view",
        True,
    ),
    "openi png: no image is named": (
        lambda r: (r / xml).write_text((r / xml).read_text().replace("parentImage", "childImage")),
        "no image of the view",
        True,
    ),
    "openi dicom: DICOM cut in its pixels": (
        lambda r: cut(r / "NLMCXR_dcm/3/3_IM-0003-1001.dcm"),
        "damaged image",
        False,
    ),
    "openi dicom: DICOM cut in its header": (
        lambda r: cut(r / "NLMCXR_dcm/3/3_IM-0003-1001.dcm", 0.03),
        "damaged image",
        False,
    ),
    "openi dicom: DICOM of one value": (
        lambda r: trees.write_dicom(r / "NLMCXR_dcm/3/3_IM-0003-1001.dcm", np.full((50, 60), 7)),
        "flat image",
        False,
    ),
    "openi dicom: DICOM without its preamble": (
        lambda r: (r / "NLMCXR_dcm/3/3_IM-0003-1001.dcm").write_bytes(b"\0" * 400),
        "damaged image",
        False,
    ),
    # Kaggle
    "kaggle: a report row is too long": (
        lambda r: edit(r / "indiana_reports.csv", "\n3,", "\n3,,,,"),
        "wrong number of cells",
        True,
    ),
    "kaggle: a report row is cut": (
        lambda r: edit(
            r / "indiana_reports.csv",
            "\n3,Pleural Effusion/left/small,,Xray Chest PA and Lateral",
            "\n3\n900,Pleural Effusion/left/small,,Xray Chest PA and Lateral",
        ),
        "wrong number of cells",
        True,
    ),
    "kaggle: uid is no number": (
        lambda r: rows(r / "indiana_reports.csv", lambda t: set_(t, 2, uid="three")),
        "no identifier",
        True,
    ),
    "kaggle: uid is empty": (
        lambda r: rows(r / "indiana_reports.csv", lambda t: set_(t, 2, uid="")),
        "no identifier",
        True,
    ),
    "kaggle: duplicate uid": (
        lambda r: rows(r / "indiana_reports.csv", lambda t: t + [t[2]]),
        "duplicate id",
        False,
    ),
    "kaggle: findings empty": (
        lambda r: rows(r / "indiana_reports.csv", lambda t: set_(t, 2, findings="")),
        "no findings",
        True,
    ),
    "kaggle: MeSH empty": (
        lambda r: rows(r / "indiana_reports.csv", lambda t: set_(t, 2, MeSH="")),
        "no labels",
        True,
    ),
    "kaggle: an unknown projection": (
        lambda r: rows(r / "indiana_projections.csv", lambda t: set_(t, 5, projection="Oblique")),
        "unknown projection",
        False,
    ),
    "kaggle: a projection row is too short": (
        lambda r: edit(
            r / "indiana_projections.csv", "3,3_IM-0003-2001.dcm.png,Lateral", "3,3_IM-0003-2001.dcm.png"
        ),
        "wrong number of cells",
        False,
    ),
    "kaggle: no projection row for a study": (
        lambda r: rows(r / "indiana_projections.csv", lambda t: [x for x in t if x["uid"] != "3"]),
        "no image of the view",
        True,
    ),
    "kaggle: projections of a study without report": (
        lambda r: rows(r / "indiana_reports.csv", lambda t: [x for x in t if x["uid"] != "3"]),
        "images without a report",
        True,
    ),
    "kaggle: the frontal film is missing": (lambda r: (r / norm).unlink(), "no image of the view", True),
    "kaggle: the frontal film is cut": (lambda r: cut(r / norm, 0.8), "no image of the view", True),
    "kaggle: the lateral film is cut": (
        lambda r: cut(r / norm.replace("1001", "2001")),
        "damaged image",
        False,
    ),
    # R2Gen
    "r2gen iu: no report": (lambda r: entries(r, lambda d: d["train"][1].pop("report")), "missing key", True),
    "r2gen iu: no image_path": (
        lambda r: entries(r, lambda d: d["train"][1].pop("image_path")),
        "missing key",
        True,
    ),
    "r2gen iu: report is a number": (
        lambda r: entries(r, lambda d: set_(d["train"], 1, report=5)),
        "not a text",
        True,
    ),
    "r2gen iu: report is empty": (
        lambda r: entries(r, lambda d: set_(d["train"], 1, report=" ")),
        "no report",
        True,
    ),
    "r2gen iu: image_path is a number": (
        lambda r: entries(r, lambda d: set_(d["train"], 1, image_path=[3])),
        "not a path",
        True,
    ),
    "r2gen iu: an entry is a text": (
        lambda r: entries(r, lambda d: d["train"].__setitem__(1, "CXR3")),
        "not an entry",
        True,
    ),
    "r2gen iu: an entry is null": (
        lambda r: entries(r, lambda d: d["train"].__setitem__(1, None)),
        "not an entry",
        True,
    ),
    "r2gen iu: split contradicts": (
        lambda r: entries(r, lambda d: set_(d["train"], 1, split="test")),
        "contradictory split",
        True,
    ),
    "r2gen iu: the same id twice": (
        lambda r: entries(r, lambda d: d["val"].append(d["train"][1] | dict(split="val"))),
        "duplicate id",
        False,
    ),
    "r2gen iu: an unknown split": (
        lambda r: entries(r, lambda d: d.__setitem__("holdout", [d["train"].pop(1) | dict(split="holdout")])),
        "unknown split",
        True,
    ),
    "r2gen iu: both images are missing": (
        lambda r: shutil.rmtree(r / "images/CXR3_IM-0003"),
        "no image of the view",
        True,
    ),
    # MIMIC-CXR-JPG
    "mimic: report missing": (lambda r: (r / txt).unlink(), "missing report", True),
    "mimic: report not UTF-8": (
        lambda r: (r / txt).write_bytes(b"\n FINDINGS: \xff\xfe clear"),
        "not text",
        True,
    ),
    "mimic: report empty": (lambda r: (r / txt).write_text(""), "no findings", True),
    "mimic: report without IMPRESSION": (
        lambda r: edit(r / txt, "IMPRESSION:", "NOTIFICATION:"),
        "no impression",
        True,
    ),
    "mimic: report without headers": (
        lambda r: (r / txt).write_text("The lungs are clear as they were before."),
        "no findings",
        True,
    ),
    "mimic: frontal film cut": (lambda r: cut(r / jpg), "no image of the view", True),
    "mimic: frontal film missing": (lambda r: (r / jpg).unlink(), "missing image", True),
    "mimic: frontal film flat": (lambda r: Image.new("L", (500, 500), 77).save(r / jpg), "flat image", True),
    "mimic: no metadata row": (
        lambda r: rows(r / meta, lambda t: [x for x in t if x["study_id"] != "50000003"]),
        "absent study",
        True,
    ),
    "mimic: no split row": (
        lambda r: rows(r / spl, lambda t: [x for x in t if x["study_id"] != "50000003"]),
        "not in the split table",
        True,
    ),
    "mimic: an unknown split": (
        lambda r: rows(
            r / spl, lambda t: [x | dict(split="holdout") if x["study_id"] == "50000003" else x for x in t]
        ),
        "unknown split",
        True,
    ),
    "mimic: two splits": (
        lambda r: rows(
            r / spl,
            lambda t: t + [dict(dicom_id="x", study_id="50000003", subject_id="10000001", split="test")],
        ),
        "contradictory split",
        True,
    ),
    "mimic: study_id is no number": (
        lambda r: rows(
            r / spl, lambda t: [x | dict(study_id="s") if x["study_id"] == "50000003" else x for x in t]
        ),
        "broken table row",
        True,
    ),
    "mimic: no row in the CheXpert table": (
        lambda r: rows(r / chx, lambda t: [x for x in t if x["study_id"] != "50000003"]),
        "no labels",
        True,
    ),
    "mimic: a label that is none": (
        lambda r: rows(r / chx, lambda t: set_(t, 2, Edema="maybe")),
        "broken labels",
        True,
    ),
    "mimic: a label out of range": (
        lambda r: rows(r / chx, lambda t: set_(t, 2, Edema="2.0")),
        "broken labels",
        True,
    ),
    # one's own table
    "csv: a row is too long": (lambda r: edit(r, "study3,", "study3,,"), "wrong number of cells", True),
    "csv: an unknown split": (
        lambda r: rows(r, lambda t: set_(t, 2, split="holdout")),
        "unknown split",
        True,
    ),
    "csv: views do not fit": (lambda r: rows(r, lambda t: set_(t, 2, view="PA")), "views do not fit", True),
    "csv: no image named": (
        lambda r: rows(r, lambda t: set_(t, 2, image="", view="")),
        "no image of the view",
        True,
    ),
    "csv: image path does not exist": (
        lambda r: rows(r, lambda t: set_(t, 2, image="img/none.png", view="PA")),
        "missing image",
        True,
    ),
    "csv: impression empty": (lambda r: rows(r, lambda t: set_(t, 2, impression="")), "no impression", True),
    "csv: the same id twice": (lambda r: rows(r, lambda t: t + [t[2]]), "duplicate id", False),
    "csv: only a lateral film": (
        lambda r: rows(r, lambda t: set_(t, 2, view="LATERAL;LATERAL")),
        "no image of the view",
        True,
    ),
    "jsonl: a line is not JSON": (
        lambda r: edit(r, '{"study_id": "study3"', '{"study_id: "study3"'),
        "broken JSON",
        True,
    ),
    "jsonl: a line is a list": (lambda r: edit(r, "\n", "\n[1, 2]\n"), "broken JSON", False),
    "jsonl: a text is a number": (lambda r: edit(r, json.dumps(trees.texts(3)[0]), "3"), "not a text", True),
    "jsonl: an image is a number": (
        lambda r: edit(r, '["img/3.png", "img/3.jpg"]', "[3, 4]"),
        "not a path",
        True,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_costs_at_most_its_study(name, masters, tmp_path):
    layout = name.split(": ")[0]
    root = Path(
        shutil.copytree(
            masters[layout].parent if masters[layout].is_file() else masters[layout], tmp_path / "tree"
        )
    )
    if masters[layout].is_file():
        root = root / masters[layout].name
    break_it, kind, lost = FAULTS[name]
    break_it(root)
    studies = loaded(layout, root, tmp_path)
    good = ids(loaded(layout, masters[layout], tmp_path))
    lost_ids = {LOST[layout]} if lost else set()
    assert good - lost_ids <= ids(studies) and not lost_ids & ids(
        studies
    )  # nothing good is lost, nothing broken is kept
    aside = studies.set_aside
    assert kind in set(aside.kind), aside.to_string()
    line = aside[aside.kind == kind].iloc[0]
    assert (
        line["message"]
        and "\n" not in line["message"]
        and (Path(line["where"].split(":")[0]).name or line["where"] == "split file")
    )
    with pytest.raises(DataError, match="strict=True"):
        loaded(layout, root, tmp_path, strict=True)


STOPS = {  # what makes everything unreadable: (layout, what is done, what the message says)
    "missing root": ("kaggle", lambda r: shutil.rmtree(r), "no such folder"),
    "root is a file": ("kaggle", lambda r: shutil.rmtree(r) or r.write_text(""), "is a file"),
    "no reports in Open-i": (
        "openi png",
        lambda r: shutil.rmtree(r / "ecgen-radiology"),
        "neither ecgen-radiology",
    ),
    "an empty ecgen-radiology": (
        "openi png",
        lambda r: shutil.rmtree(r / "ecgen-radiology") or (r / "ecgen-radiology").mkdir(),
        "no \\*.xml",
    ),
    "a broken archive": (
        "openi png",
        lambda r: shutil.rmtree(r / "ecgen-radiology") or (r / "NLMCXR_reports.tgz").write_bytes(b"no"),
        "tar archive",
    ),
    "another header": (
        "kaggle",
        lambda r: edit(r / "indiana_reports.csv", "findings", "FINDINGS"),
        "no column findings",
    ),
    "no projections": (
        "kaggle",
        lambda r: (r / "indiana_projections.csv").unlink(),
        "no indiana_projections.csv",
    ),
    "an empty CSV": ("kaggle", lambda r: (r / "indiana_reports.csv").write_bytes(b""), r"\(nothing\)"),
    "a binary CSV": (
        "kaggle",
        lambda r: (r / "indiana_reports.csv").write_bytes(b"\xff\xfe\x00" * 50),
        "not readable as CSV",
    ),
    "annotation is not JSON": (
        "r2gen iu",
        lambda r: (r / "annotation.json").write_text("{"),
        "not readable as JSON",
    ),
    "annotation without splits": (
        "r2gen iu",
        lambda r: (r / "annotation.json").write_text("[]"),
        "holds no splits",
    ),
    "MIMIC's file as IU's": (
        "r2gen iu",
        lambda r: entries(
            r, lambda d: d["train"][0].__setitem__("image_path", ["p10/p10000032/s50414267/x.jpg"])
        ),
        "not a name of IU X-Ray",
    ),
    "MIMIC's file as IU's, names alone": (
        "r2gen iu",
        lambda r: entries(
            r,
            lambda d: d["train"][0].update(
                id="02aa804e", image_path=["02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.jpg"]
            ),
        ),
        "not a name of IU X-Ray",
    ),
    "MIMIC's images under IU's ids": (
        "r2gen iu",
        lambda r: entries(r, lambda d: d["train"][0].__setitem__("image_path", ["02aa804e-bde0afdd.jpg"])),
        "not a name of IU X-Ray",
    ),
    "CheXpert Plus as IU's": (
        "r2gen iu",
        lambda r: entries(
            r,
            lambda d: d["train"][0].update(
                id="patient42142/study5", image_path=["train/patient42142/study5/view1_frontal.jpg"]
            ),
        ),
        "not a name of IU X-Ray",
    ),
    "another hospital's in Kaggle's layout": (
        "kaggle",
        lambda r: edit(r / "indiana_projections.csv", "1_IM-0001-1001.dcm.png", "02aa804e-bde0afdd.jpg"),
        "not a name of IU X-Ray",
    ),
    "another hospital's in Open-i's layout": (
        "openi png",
        lambda r: edit(r / "ecgen-radiology/3.xml", 'id="CXR3"', 'id="s50414267"'),
        "not a name of IU X-Ray",
    ),
    "no split table": ("mimic", lambda r: (r / spl).unlink(), "no mimic-cxr-2"),
    "two split tables": (
        "mimic",
        lambda r: shutil.copy(r / spl, r / "mimic-cxr-2.0.0-split.csv.gz"),
        "more than one",
    ),
    "a cut table": ("mimic", lambda r: cut(r / meta), "not readable as CSV"),
    "a table that is not gzip": ("mimic", lambda r: (r / meta).write_text("a,b"), "not readable as CSV"),
    "no files folder": ("mimic", lambda r: shutil.rmtree(r / "files"), "no files in it"),
    "a table without report": (
        "csv",
        lambda r: r.write_text("image,text\na.png,b\n"),
        "expected image and report",
    ),
    "a table of another kind": ("csv", lambda r: r.unlink() or r.mkdir(), "expected a .csv or .jsonl file"),
    "no study left": (
        "csv",
        lambda r: rows(r, lambda t: [x | dict(findings="") for x in t]),
        "no study of table can be used",
    ),
}


def test_what_has_flat_names_is_restricted_under_the_only_source_that_reads_it(masters, tmp_path):
    root = Path(shutil.copytree(masters["r2gen mimic"], tmp_path / "tree"))

    def flat(annotation):
        for entry in (e for split in annotation.values() for e in split):
            shutil.copy(root / "images" / entry["image_path"][0], root / "images" / f"{entry['id']}.jpg")
            entry["image_path"] = [f"{entry['id']}.jpg"]

    entries(root, flat)
    assert len(loaded("r2gen mimic", root, tmp_path)["train"]) and terms_of("r2gen_mimic").restricted


@pytest.mark.parametrize("name", STOPS)
def test_nothing_can_be_read(name, masters, tmp_path):
    layout, break_it, says = STOPS[name]
    root = Path(
        shutil.copytree(
            masters[layout].parent if masters[layout].is_file() else masters[layout], tmp_path / "tree"
        )
    )
    if masters[layout].is_file():
        root = root / masters[layout].name
    break_it(root)
    with pytest.raises(DataError, match=says) as error:
        loaded(layout, root, tmp_path)
    assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]  # nothing half-made


@pytest.mark.parametrize(
    "text, says",
    [
        ("study_id,split\nCXR1,holdout\n", "holdout"),
        ("study,split\n", "no column study_id"),
        ("study_id,split\nCXR1,train\nCXR1,test\n", "in two splits"),
        (None, "no such file"),
    ],
)
def test_broken_split_file(text, says, masters, tmp_path):
    if text:
        (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        loaded("kaggle", masters["kaggle"], tmp_path, splits=tmp_path / "s.csv")


# ---- properties ----------------------------------------------------------------------------------

KINDS = ("a.png", "b.jpg", "c.dcm")


@lru_cache
def film_bytes(name):
    with tempfile.TemporaryDirectory() as home:
        trees.film(Path(home) / name, 3, size=(90, 70))
        return (Path(home) / name).read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.floats(0, 0.97))
def test_a_cut_image_is_always_noticed(name, keep):
    data = film_bytes(name)[: int(len(film_bytes(name)) * keep)]
    with pytest.raises(ImageError):
        check_image(data, name=name)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.data())
def test_damage_never_escapes_as_another_error(name, data):
    raw = bytearray(film_bytes(name))
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=20)):
        raw[at] = data.draw(st.integers(0, 255))
    try:
        check_image(bytes(raw), full=True)
        assert read_image(bytes(raw)).dtype == np.uint8
    except ImageError as e:
        assert "\n" not in str(e)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_read(data):
    try:
        check_image(data)
    except ImageError:
        pass


HEADERS = st.sampled_from(
    [
        "\n FINDINGS: ",
        "\n IMPRESSION:\n",
        "\n \n",
        "\n CHEST, TWO VIEWS:\n",
        "\n INDICATION: ",
        "\n WET READ: ",
        "FINDINGS: ",
        "\n COMPARISON: ",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(HEADERS, st.text(alphabet="abcXYZ .:\n_", max_size=30)), max_size=12))
def test_sections_never_invent_text(parts):
    text = "".join(parts)
    for name, body in parse_sections(text).items():
        assert body in text and body == body.strip()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, N - 1), max_size=N - 1), st.integers(0, 10**6))
def test_random_damage_costs_exactly_the_damaged(masters, tmp_path_factory, broken, seed):
    tmp = tmp_path_factory.mktemp("random")
    root = Path(shutil.copytree(masters["csv"].parent, tmp / "tree")) / "mine.csv"
    kinds = np.random.default_rng(seed).integers(0, 4, N)
    table = trees.read_csv(root)
    for i in broken:
        table[i] |= [
            dict(findings=""),
            dict(split="?"),
            dict(view="PA"),
            dict(image="img/no.png;img/no.jpg"),
        ][kinds[i]]
    trees.write_csv(root, table)
    studies = load_studies("table", root, cache=tmp / "cache")
    assert ids(studies) == {f"study{i + 1}" for i in range(N) if i not in broken}


# ---- storing, caching, permission ----------------------------------------------------------------


def test_damage_in_the_middle_is_found_when_decoded(tmp_path):
    root = trees.table(tmp_path / "t", N)
    flip(root.parent / "img/3.png", 700)
    assert "study3" in ids(load_studies("table", root, cache=tmp_path / "cache"))  # a glance does not see it
    studies = load_studies("table", root, cache=tmp_path / "cache", check="full")
    assert "study3" not in ids(studies)
    glance = load_studies("table", root, cache=tmp_path / "cache")
    split = next(s for s, d in glance.items() if "study3" in d["study_id"])
    stored, faults = store_images(glance[split], tmp_path / "stored", 32)
    assert [f.study_id for f in faults] == ["study3"] and len(stored) == len(glance[split]) - 1


def test_storing_resumes(masters, tmp_path):
    studies = loaded("csv", masters["csv"], tmp_path)["train"]
    whole, _ = store_images(studies, tmp_path / "a", 32, shard=2)
    store_images(studies, tmp_path / "b", 32, shard=2)
    for p in sorted((tmp_path / "b").iterdir())[-2:]:
        p.unlink()  # as if killed in the last shard
    (tmp_path / "b" / "000000002.making").write_bytes(b"half")
    again, _ = store_images(studies, tmp_path / "b", 32, shard=2)
    assert again["study_id"] == whole["study_id"] and all(
        x == y for x, y in zip(again["image"], whole["image"])
    )


def test_index_is_read_again_and_noticed_to_be_old(masters, tmp_path):
    root = Path(shutil.copytree(masters["kaggle"], tmp_path / "tree"))
    first = loaded("kaggle", root, tmp_path)
    stamp = (first.folder / "info.json").stat().st_mtime_ns
    assert (loaded("kaggle", root, tmp_path).folder / "info.json").stat().st_mtime_ns == stamp
    rows(root / "indiana_reports.csv", lambda t: t[:-1])
    assert len(ids(loaded("kaggle", root, tmp_path))) == N - 1


def test_the_report_shows_no_text(masters, tmp_path):
    studies = loaded("mimic", masters["mimic"], tmp_path)
    assert not [
        w
        for w in ("effusion number", "lungs are clear", "opacity in the")
        if w in to_markdown(data_report(studies)).lower()
    ]


def test_two_images_reach_the_policy(masters, tmp_path):
    """`view='both'`: SFT, a GRPO step and generation see two images a study, and the prompt has a place
    for each."""
    from trl import GRPOConfig, GRPOTrainer

    from valor.policy.models import load_policy, save_policy
    from valor.policy.prompt import conversations, image_lists
    from valor.policy.tiny import build_policy, generate
    from valor.train.sft import sft

    data = loaded("csv", masters["csv"], tmp_path, view="both", size=32)["train"]
    save_policy(
        *build_policy([f"<report> {r} </report>" for r in data["report"]], image_size=32, width=32),
        tmp_path / "base",
    )
    sft(
        tmp_path / "base",
        conversations(data, [f"<report> {r} </report>" for r in data["report"]]),
        tmp_path / "sft",
        batch_size=2,
    )
    model, processor = load_policy(tmp_path / "sft")
    seen, forward = [], model.model.vision_tower.forward
    model.model.vision_tower.forward = lambda pixels, *a, **k: (
        seen.append(len(pixels)) or forward(pixels, *a, **k)
    )
    one, two = (
        generate(model, processor, list(data["image"])[:2], 4),
        generate(model, processor, image_lists(data)[:2], 4),
    )
    assert len(one) == len(two) == 2 and seen == [2, 4]
    args = GRPOConfig(
        str(tmp_path / "g"),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
    )
    seen.clear()
    GRPOTrainer(
        model,
        reward_funcs=lambda completions, **k: [float(len(str(c))) for c in completions],
        args=args,
        train_dataset=conversations(data),
        processing_class=processor,
    ).train()
    assert seen[0] == 4  # two candidates, two images each


# ---- views ---------------------------------------------------------------------------------------


def swap(root, *names):
    "Write films of the given views over files: {path: view}."
    for i, (name, view) in enumerate(names):
        trees.film(root / name, 900 + i, view=view)


def main_images(studies):
    return {
        r["study_id"]: Path(r["image"]["path"]).name
        for d in studies.values()
        for r in d.cast_column("image", datasets.Image(decode=False))
    }


def test_openi_takes_the_frontal_film_by_its_picture(tmp_path):
    """Open-i's XML names no view: the main image of CXR1 and CXR10 is the second film, as it is in the
    real archive (there by the name -4001 and -2001)."""
    root = trees.openi(tmp_path / "t", N)
    swap(
        root,
        ("NLMCXR_png/CXR1_1_IM-0001-1001.png", "lateral"),
        ("NLMCXR_png/CXR10_1_IM-0010-1001.png", "lateral"),
    )
    swap(root, *((f"NLMCXR_png/CXR5_1_IM-0005-{n}001.png", "lateral") for n in (1, 2)))
    studies = loaded("openi png", root, tmp_path)
    chosen = main_images(studies)
    assert (
        chosen["CXR1"] == "CXR1_1_IM-0001-2001.png"
        and chosen["CXR10"] == "CXR10_1_IM-0010-2001.png"
        and chosen["CXR2"] == "CXR2_1_IM-0002-1001.png"
    )
    assert (
        studies.set_aside[["study_id", "kind"]].values.tolist() == [["CXR5", "no image of the view"]]
        and "lateral, lateral" in studies.set_aside.message[0]
    )
    seen = studies.info["seen"]
    assert (
        seen["main image is another than by tags and order"],
        seen["studies without a frontal image"],
        seen["main image in doubt"],
    ) == (2, 1, 0)
    assert len(studies.views) == 2 * N and (studies.views.used == "main").sum() == N - 1
    assert data_report(studies)["Views"].loc["unknown"].to_dict() == {
        "frontal": 20,
        "lateral": 4,
        "contradicted": 0,
    }


def test_a_wrong_tag_does_not_count_where_tags_are_wrong(tmp_path, monkeypatch):
    root = trees.openi(tmp_path / "t", N)
    monkeypatch.setattr(
        "valor.data.sources.openi_views",
        lambda: {f"CXR3_IM-0003-{n}001": view for n, view in ((1, "frontal"), (2, "lateral"))},
    )
    swap(root, ("NLMCXR_png/CXR3_1_IM-0003-1001.png", "lateral"))
    studies = loaded("openi png", root, tmp_path)
    assert main_images(studies)["CXR3"] == "CXR3_1_IM-0003-2001.png"
    assert data_report(studies)["Views"]["contradicted"].to_dict() == {
        "frontal": 1,
        "lateral": 1,
        "unknown": 0,
    }


def test_r2gen_main_image_is_frontal(tmp_path):
    root = trees.r2gen(tmp_path / "t", N)
    swap(root, ("images/CXR4_IM-0004/0.png", "lateral"), ("images/CXR4_IM-0004/1.png", "frontal"))
    studies = loaded("r2gen iu", root, tmp_path)
    assert main_images(studies) == {
        f"CXR{i}_IM-{i:04d}": "1.png" if i == 4 else "0.png" for i in range(1, N + 1)
    }
    row = loaded("r2gen iu", root, tmp_path, preset="r2gen")["test"][0]
    assert row["view"] == "unknown"  # R2Gen's own reading: the images as listed


def test_stated_views_of_kaggle_and_mimic_are_right(tmp_path):
    "Where tags are trusted a picture changes nothing; checked in full, it is compared."
    root = trees.kaggle(tmp_path / "t", N)
    swap(root, ("images/images_normalized/1_IM-0001-1001.dcm.png", "lateral"))
    assert main_images(loaded("kaggle", root, tmp_path))["CXR1"] == "1_IM-0001-1001.dcm.png" and not len(
        loaded("kaggle", root, tmp_path).views
    )
    full = loaded("kaggle", root, tmp_path, check="full")
    assert main_images(full)["CXR1"] == "1_IM-0001-1001.dcm.png" and data_report(full)["Views"][
        "contradicted"
    ].to_dict() == {"frontal": 1, "lateral": 0}


def test_an_inverted_film_is_not_taken_in_silence(tmp_path):
    root = trees.r2gen(tmp_path / "t", N)
    path = root / "images/CXR4_IM-0004/0.png"
    Image.fromarray(255 - np.array(Image.open(path))).save(path)
    studies = loaded("r2gen iu", root, tmp_path)
    line = studies.set_aside[studies.set_aside.study_id == "CXR4_IM-0004"].iloc[0]
    assert (
        line.kind == "no image of the view" and "unsure" in line.message and "view='listed'" in line.message
    )


def test_a_picture_is_read_once(tmp_path, monkeypatch):
    root = trees.r2gen(tmp_path / "t", N)
    first = loaded("r2gen iu", root, tmp_path)
    monkeypatch.setattr("valor.data.studies.picture_view", lambda film: pytest.fail("read again"))
    assert main_images(loaded("r2gen iu", root, tmp_path, min_words=2)) == main_images(first)
    monkeypatch.undo()
    swap(root, ("images/CXR4_IM-0004/0.png", "lateral"), ("images/CXR4_IM-0004/1.png", "frontal"))
    assert main_images(loaded("r2gen iu", root, tmp_path, min_words=3))["CXR4_IM-0004"] == "1.png"


def real(*names):
    "A file or folder of the real material under VALOR_REAL; the test is skipped where it is not there."
    path = Path(os.environ.get("VALOR_REAL") or "nowhere").joinpath(*names)
    if not path.exists():
        pytest.skip(f"VALOR_REAL names no folder with {'/'.join(names)}")
    return path


def test_views_of_real_films():
    """All films of IU X-Ray, at 24 x 24 pixels, and the frontal ones that are here at 192 x 192: what
    Kaggle's projections say."""
    known = np.load(real("iu_xray", "views_24.npz"))
    read = np.array([v.removeprefix("unsure ") for v in views_of(known["images"])])
    assert (
        (read == "frontal") != known["frontal"]
    ).sum() == 29  # on what it was fitted on; five folds: 44 (chapter 01g)
    films = sorted(real("iu_xray", "images", "images_normalized").glob("*.jpg"))
    at_192 = Counter(picture_view(read_image(f)) for f in films[::10])
    assert at_192["lateral"] + at_192["unsure lateral"] <= 4 and at_192["frontal"] >= 0.98 * len(films[::10])


# ---- sections follow what is there ---------------------------------------------------------------


def small_table(tmp_path, columns, kind="csv"):
    "A table of six studies with an image and the given text columns."
    rows = [
        dict(
            image=f"{i}.png",
            split="train" if i < 4 else "test",
            **{c: f"The {c} of this study is number {i}." for c in columns},
        )
        for i in range(6)
    ]
    for i in range(6):
        trees.film(tmp_path / f"{i}.png", i)
    path = tmp_path / f"mine.{kind}"
    trees.write_csv(path, rows) if kind == "csv" else path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "columns, preset, sections",
    [
        (["report"], "valor", "report"),
        (["findings"], "valor", "findings"),
        (["impression"], "valor", "impression"),
        (["findings", "impression"], "valor", "both"),
        (["report", "findings"], "valor", "report"),
        (["report", "findings"], "r2gen", "findings"),
        (["report"], "r2gen", "report"),
    ],
)
def test_sections_follow_the_columns_of_a_table(kind, columns, preset, sections, tmp_path):
    studies = load_studies(
        "table", small_table(tmp_path, columns, kind), preset, cache=tmp_path / "cache", size=32
    )
    assert studies.info["how"]["sections"] == sections and len(ids(studies)) == 6


def test_the_message_names_sections(tmp_path):
    with pytest.raises(DataError, match="2 read|6 read") as error:
        load_studies("table", small_table(tmp_path, ["report"]), sections="both", cache=tmp_path / "cache")
    assert "sections='both' needs findings" in str(error.value) and "give sections='report'" in str(
        error.value
    )


REAL = {
    "openi": "openi png",
    "kaggle_indiana": "kaggle",
    "r2gen_iu": "r2gen iu",
    "r2gen_mimic": "r2gen mimic",
    "mimic_cxr_jpg": "mimic",
    "table": "csv",
    "hf": "csv",
    "chexpert_plus": "chexpert plus",
    "padchest": "padchest",
    "rexgradient": "rexgradient",
}


@pytest.mark.parametrize("source", REAL)
@pytest.mark.parametrize("name", ["smoke", "laptop", "paper"])
def test_every_preset_reads_every_source(name, source, masters, tmp_path):
    "The sections that a preset takes of a source are there: smoke's too."
    root = masters[REAL[source]]
    if source == "hf":
        part = datasets.Dataset.from_dict(
            dict(
                image=[str(root.parent / f"img/{i}.png") for i in range(1, N + 1)],
                report=[f"The heart is normal in size {i}." for i in range(N)],
            )
        )
        part.save_to_disk(tmp_path / "hf")
        root = tmp_path / "hf"
    known = ("openi", "kaggle_indiana", "mimic_cxr_jpg", "chexpert_plus", "rexgradient")
    weights = dict(expert="embedded", chexbert="rules", radgraph="rules") if name == "paper" else {}
    cfg = preset(name, benchmark=source, data_root=str(root), image_size=64, **weights)
    assert cfg.sections == ("both" if source in known else "auto" if source in ("table", "hf") else "report")
    assert len(ids(load_studies(source, root, sections=cfg.sections, cache=tmp_path / "cache"))) == N


# ---- labels from codes ---------------------------------------------------------------------------


def test_no_finding_only_where_the_codes_say_normal():
    def named(*codes):
        return dict(zip(OBSERVATIONS, code_labels(codes)))

    assert named("normal")["No Finding"] == 1 and sum(map(bool, named("normal").values())) == 1
    for code in (
        "Calcified Granuloma/lung/upper lobe/right",
        "Hernia, Hiatal",
        "Spine/degenerative",
        "Technical Quality of Image Unsatisfactory",
        "Scoliosis",
    ):
        assert named(code)["No Finding"] is None and not any(named(code).values()), code
    assert (
        named("Pneumonia/left")["No Finding"] == 0
        and named("Hernia, Hiatal", "Cardiomegaly/mild")["No Finding"] == 0
    )


def test_a_coded_finding_is_not_no_finding_in_the_data(tmp_path):
    root = trees.openi(tmp_path / "t", N)
    edit(root / xml, trees.MESH[0][0], "Hernia, Hiatal")
    labels = {
        r["study_id"]: r["labels"]
        for d in loaded("openi png", root, tmp_path, view="none").values()
        for r in d.remove_columns(["image", "second_image"])
    }
    assert (
        labels["CXR3"] == [0] * 14 and sum(l[OBSERVATIONS.index("No Finding")] for l in labels.values()) == 4
    )  # those that are coded normal


def test_no_finding_of_the_real_codes():
    found = [
        code_labels(s.codes)[OBSERVATIONS.index("No Finding")]
        for s in SOURCES["kaggle_indiana"].read(real("iu_xray"))
        if isinstance(s, Study)
    ]
    assert (len(found), found.count(1)) == (
        3851,
        sum(
            "normal" in s.codes
            for s in SOURCES["kaggle_indiana"].read(real("iu_xray"))
            if isinstance(s, Study)
        ),
    )


# ---- tables as people save them ------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["nan", "NaN", "None", " nan "])
def test_a_saved_empty_cell_is_no_text(cell, tmp_path):
    table = trees.table(tmp_path / "t", N)
    rows(table, lambda t: set_(t, 2, impression=cell) or set_(t, 4, findings=cell))
    studies = load_studies("table", table, cache=tmp_path / "cache")
    assert studies.set_aside[["study_id", "kind"]].values.tolist() == [
        ["study3", "no impression"],
        ["study5", "no findings"],
    ]
    root = trees.kaggle(tmp_path / "k", N)
    rows(root / "indiana_reports.csv", lambda t: set_(t, 2, impression=cell))
    assert load_studies("kaggle_indiana", root, cache=tmp_path / "cache").set_aside.kind.tolist() == [
        "no impression"
    ]
    root = trees.r2gen(tmp_path / "r", N)
    entries(root, lambda d: set_(d["train"], 1, report=cell))
    assert load_studies("r2gen_iu", root, cache=tmp_path / "cache").set_aside.kind.tolist() == ["no report"]


def test_blanks_around_an_identifier_make_no_second_patient(tmp_path):
    table = trees.table(tmp_path / "t", N)
    rows(
        table,
        lambda t: (
            set_(t, 0, patient_id="x", split="train")
            or set_(t, 1, patient_id="x ", split="test")
            or set_(t, 2, study_id="study4 ")
        ),
    )
    studies = load_studies("table", table, cache=tmp_path / "cache")
    assert data_report(studies)["Leakage"]["patients"].sum() >= 1 and studies.set_aside.kind.tolist() == [
        "duplicate id"
    ]


def test_kaggle_numbers_that_pandas_made_floats(tmp_path):
    root = trees.kaggle(tmp_path / "k", N)
    rows(root / "indiana_reports.csv", lambda t: [r | dict(uid=f"{r['uid']}.0") for r in t])
    studies = load_studies("kaggle_indiana", root, cache=tmp_path / "cache")
    assert ids(studies) == {f"CXR{i}" for i in range(1, N + 1)} and not len(studies.set_aside)


SAVED = {  # how a table was saved: (layout, what is done to it, what the message says)
    "a column twice": ("csv", lambda r: edit(r, "split", "findings"), "names the column findings twice"),
    "semicolons": (
        "csv",
        lambda r: r.write_text(r.read_text().replace(";", " ").replace(",", ";")),
        "separated by semicolons",
    ),
    "tabs": ("csv", lambda r: r.write_text(r.read_text().replace(",", "\t")), "separated by tabs"),
    "lists as text": (
        "csv",
        lambda r: rows(r, lambda t: [x | dict(image="['a.png', 'b.png']", view="") for x in t]),
        "is a list written as text",
    ),
    "backslashes": (
        "csv",
        lambda r: rows(r, lambda t: [x | dict(image="img\\1.png", view="") for x in t]),
        "has backslashes",
    ),
    "URLs": (
        "csv",
        lambda r: rows(r, lambda t: [x | dict(image="https://host/1.png", view="") for x in t]),
        "is a URL",
    ),
    "a column of Kaggle's twice": (
        "kaggle",
        lambda r: edit(r / "indiana_reports.csv", "Problems", "findings"),
        "names the column findings twice",
    ),
    "packed beside unpacked": (
        "mimic",
        lambda r: (r / spl.removesuffix(".gz")).write_text("x"),
        "more than one",
    ),
    "MIMIC without its reports": (
        "mimic",
        lambda r: [p.unlink() for p in r.rglob("s*.txt")],
        "holds no reports, give the folder",
    ),
    "a split without a name": (
        "r2gen iu",
        lambda r: entries(r, lambda d: d.__setitem__("    ", d.pop("test"))),
        "a key of blanks alone",
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_the_message_names_the_cause(name, masters, tmp_path):
    layout, save, says = SAVED[name]
    root = Path(
        shutil.copytree(
            masters[layout].parent if masters[layout].is_file() else masters[layout], tmp_path / "tree"
        )
    )
    if masters[layout].is_file():
        root = root / masters[layout].name
    save(root)
    with pytest.raises(DataError, match=says) as error:
        loaded(layout, root, tmp_path)
    assert "\n" not in str(error.value)


def test_smoke_reads_the_real_r2gen_split(tmp_path):
    """Here every study has its frontal film alone: 11 of 2,947 are called lateral by their pictures,
    listed and set aside; no study lacks its report."""
    root = real("iu_xray")
    studies = load_studies(
        "r2gen_iu",
        root,
        sections=preset("smoke", benchmark="r2gen_iu", data_root=str(root)).sections,
        cache=tmp_path / "cache",
    )
    assert {s: len(d) for s, d in studies.items()} == dict(train=2057, val=293, test=586)
    assert (
        studies.set_aside.kind.value_counts().to_dict() == {"no image of the view": 11}
        and len(studies.views) == 2947
    )


def test_every_source_of_a_configuration_has_a_reader_and_terms():
    "A configuration accepts exactly the benchmarks and sources that data knows; every one of them has terms."
    from valor import config
    from valor.data.benchmarks import BENCHMARKS
    from valor.data.sources import SOURCES, terms_of

    assert config.REAL_SOURCES == {name: source.sections for name, source in SOURCES.items()}
    assert set(config.BENCHMARKS) == set(BENCHMARKS)
    assert all(terms_of(name).licence for name in (*BENCHMARKS, *SOURCES))


def test_a_source_is_added_by_one_registration(tmp_path, monkeypatch):
    "The example in docs/adding-your-own.md: a reader and one registration, in at most ten lines."
    from valor import config
    from valor.data import sources

    monkeypatch.setattr(sources, "SOURCES", dict(SOURCES))
    monkeypatch.setattr(config, "REAL_SOURCES", dict(config.REAL_SOURCES))
    monkeypatch.setattr("valor.data.studies.SOURCES", sources.SOURCES)
    guide = (Path(__file__).parents[1] / "docs" / "adding-your-own.md").read_text()
    example = re.search(r"```python\n(.*?)```", guide.split("## A data source")[1], re.DOTALL)[1]
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 10
    exec(example, {})
    (tmp_path / "17-2.txt").write_text("The heart is enlarged. No pleural effusion is seen.")
    cfg = config.preset("smoke", benchmark="mine", data_root=str(tmp_path))
    studies = load_studies("mine", tmp_path, view="none", sections="findings", cache=tmp_path / "cache")
    assert studies["train"]["patient_id"] == ["17"] and cfg.sections == "both"
    assert terms_of("mine").restricted
    with pytest.raises(PermissionError, match="reports of my hospital"):
        sources.check_endpoint("mine", "https://api.example.com/v1")


def test_a_benchmark_is_added_by_one_registration(monkeypatch):
    from valor import config
    from valor.data import benchmarks
    from valor.metrics.statistics import true_columns

    monkeypatch.setattr(benchmarks, "BENCHMARKS", dict(benchmarks.BENCHMARKS))
    monkeypatch.setattr(config, "BENCHMARKS", list(config.BENCHMARKS))
    phantom = benchmarks.benchmark_of("phantom")
    benchmarks.register_benchmark(
        benchmarks.Benchmark("mine", phantom.load, phantom.note, phantom.terms, truth="findings")
    )
    cfg = config.preset("smoke", benchmark="mine")
    test = benchmarks.load_benchmark(cfg.benchmark, 2, 1, 3)["test"]
    assert (true_columns(test["report"], test, "mine", None)["missed"] == 0).all()
    assert benchmarks.benchmark_note("mine", test).startswith("phantom: 3 made-up studies")
