"""Made-up studies laid out on disk exactly as each distributor lays out the real ones."""

import csv
import gzip
import json

import numpy as np
from PIL import Image

from valor.data.sources import OBSERVATIONS
from valor.data.views import drawn_film
from valor.testing import write_dicom

FINDINGS = [
    "Heart size is normal. Small left effusion number {i}.",
    "Lungs are clear. No effusion seen in film {i}.",
    "There is XXXX opacity in the right base, level {i}.",
]
IMPRESSION = ["Small effusion.", "No acute disease.", "Right basilar opacity."]
MESH = [["Pleural Effusion/left/small"], ["normal"], ["Opacity/lung/base/right"]]


def film(path, i, mode="L", size=(60, 50), view="frontal"):
    """A film that looks `frontal` or `lateral`, different for every `i`, as PNG (8 or 16 bits), JPEG or
    DICOM by the ending of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = drawn_film(view, size, seed=i).astype(np.uint16) * 16 + 8
    if path.suffix == ".dcm":
        write_dicom(path, 4095 - values if i % 2 else values, "MONOCHROME1" if i % 2 else "MONOCHROME2")
    elif mode == "16":
        Image.fromarray(values).save(path)
    else:
        Image.fromarray((values // 16).astype(np.uint8)).convert(mode).save(path)


def texts(i):
    return FINDINGS[i % 3].format(i=i), IMPRESSION[i % 3]


def openi(root, n=12, images="png"):
    "ecgen-radiology/*.xml with NLMCXR_png/ (`images` png) or NLMCXR_dcm/ (dcm)."
    (root / "ecgen-radiology").mkdir(parents=True)
    for i in range(1, n + 1):
        findings, impression = texts(i)
        names = [f"CXR{i}_1_IM-{i:04d}-1001", f"CXR{i}_1_IM-{i:04d}-2001"]
        sections = {
            "COMPARISON": "None.",
            "INDICATION": "Cough.",
            "FINDINGS": findings,
            "IMPRESSION": impression,
        }
        abstract = "".join(f'<AbstractText Label="{k}">{v}</AbstractText>' for k, v in sections.items())
        parents = "".join(
            f'<parentImage id="{name}"><figureId>F1</figureId><caption>Chest</caption></parentImage>'
            for name in names
        )
        majors = "".join(f"<major>{m}</major>" for m in MESH[i % 3])
        (root / "ecgen-radiology" / f"{i}.xml").write_text(
            f'<?xml version="1.0" encoding="utf-8"?><eCitation><meta type="rr"/><uId '
            f'id="CXR{i}"/><MedlineCitation><Article>'
            f"<Abstract>{abstract}</Abstract></Article></MedlineCitation><MeSH>{majors}</MeSH>{parents}</eCitation>"
        )
        for j, name in enumerate(names):
            film(
                root / "NLMCXR_png" / f"{name}.png"
                if images == "png"
                else root / "NLMCXR_dcm" / str(i) / f"{i}_IM-{i:04d}-{j + 1}001.dcm",
                10 * i + j,
            )
    return root


def kaggle(root, n=12):
    root.mkdir(parents=True)
    reports, projections = [], []
    for i in range(1, n + 1):
        findings, impression = texts(i)
        reports.append(
            dict(
                uid=i,
                MeSH=";".join(MESH[i % 3]),
                Problems="",
                image="Xray Chest PA and Lateral",
                indication="Cough",
                comparison="None.",
                findings=findings,
                impression=impression,
            )
        )
        for j, projection in enumerate(("Frontal", "Lateral")):
            name = f"{i}_IM-{i:04d}-{j + 1}001.dcm.png"
            projections.append(dict(uid=i, filename=name, projection=projection))
            film(root / "images" / "images_normalized" / name, 10 * i + j, view=projection.lower())
    write_csv(root / "indiana_reports.csv", reports)
    write_csv(root / "indiana_projections.csv", projections)
    return root


def r2gen(root, n=12, flat=False, mimic=False):
    """annotation.json and images/; `flat`: the variant with flat file names and no `split` in its rows;
    `mimic`: MIMIC's paths and keys."""
    data = {"train": [], "val": [], "test": []}
    for i in range(1, n + 1):
        split = "test" if i % 4 == 0 else "val" if i % 6 == 1 else "train"
        entry = dict(id=f"CXR{i}_IM-{i:04d}", report=" ".join(texts(i)))
        entry["image_path"] = [
            f"CXR{i}_IM-{i:04d}-{j}001.png" if flat else f"CXR{i}_IM-{i:04d}/{j}.png" for j in (0, 1)
        ]
        if mimic:
            entry |= dict(
                id=f"{i:08x}",
                study_id=50000000 + i,
                subject_id=10000000 + i,
                image_path=[f"p10/p{10000000 + i}/s{50000000 + i}/{i:08x}.jpg"],
            )
        if not flat:
            entry["split"] = split
        for j, p in enumerate(entry["image_path"]):
            film(root / "images" / p, 10 * i + j, view=("frontal", "lateral")[j])
        data[split].append(entry)
    (root / "annotation.json").write_text(json.dumps(data))
    return root


def mimic(root, n=12):
    "MIMIC-CXR-JPG 2.1.0 with the reports of MIMIC-CXR in the same tree."
    metadata, split, chexpert = [], [], []
    for i in range(1, n + 1):
        subject, study = f"{10000000 + i // 2}", f"{50000000 + i}"
        folder = root / "files" / f"p{subject[:2]}" / f"p{subject}"
        for j, view in enumerate(("PA", "LATERAL") if i % 3 else ("AP",)):
            dicom = f"{i:08x}-{j:08x}-aaaa-bbbb-cccc"
            film(folder / f"s{study}" / f"{dicom}.jpg", 10 * i + j, view=("frontal", "lateral")[j])
            metadata.append(
                dict(
                    dicom_id=dicom,
                    subject_id=subject,
                    study_id=study,
                    PerformedProcedureStepDescription="CHEST",
                    ViewPosition=view,
                    Rows=50,
                    Columns=60,
                )
            )
            split.append(
                dict(
                    dicom_id=dicom,
                    study_id=study,
                    subject_id=subject,
                    split=("train", "validate", "test")[(i // 2) % 3],
                )
            )
        chexpert.append(
            dict(subject_id=subject, study_id=study)
            | {o: "" for o in OBSERVATIONS}
            | {"Pleural Effusion": ("1.0", "0.0", "-1.0")[i % 3]}
        )
        findings, impression = texts(i)
        (folder / f"s{study}.txt").write_text(
            f"                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n "
            f"INDICATION:  ___ year old with cough.\n \n FINDINGS: \n \n {findings}\n \n IMPRESSION: \n \n "
            f"{impression}\n"
        )
    for name, rows in dict(metadata=metadata, split=split, chexpert=chexpert).items():
        write_csv(root / f"mimic-cxr-2.1.0-{name}.csv.gz", rows)
    return root


def chexpert_plus(root, n=12):
    "df_chexpert_plus_240401.csv, PNG/ and the distributor's CheXbert labels."
    rows, labels = [], []
    for i in range(1, n + 1):
        findings, impression = texts(i)
        part = "valid" if i % 4 == 0 else "train"
        for j, view in enumerate(("Frontal", "Lateral")):
            path = f"{part}/patient{i // 2:05d}/study{i}/view{j + 1}_{view.lower()}.jpg"
            film(root / "PNG" / path.replace(".jpg", ".png"), 10 * i + j, view=view.lower())
            who = dict(
                age=20 + 5 * i,
                sex=("Female", "Male")[i % 2],
                ap_pa=("AP", "PA")[i % 3 == 0] if j == 0 else "",
            )
            text = dict(section_findings=findings, section_impression=impression, report="x")
            text |= dict(section_history="Cough." if i % 2 else "")
            rows.append(dict(path_to_image=path, frontal_lateral=view) | who | text)
            labels.append(
                dict(path_to_image=path) | {o: None for o in OBSERVATIONS} | {"Pleural Effusion": 1.0}
            )
    write_csv(root / "df_chexpert_plus_240401.csv", rows)
    (root / "chexbert_labels").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in labels)
    (root / "chexbert_labels/impression_fixed.json").write_text(lines)
    return root


def padchest(root, n=12):
    "PadChest's table and a folder of an unpacked archive."
    rows = []
    for i in range(1, n + 1):
        names, sentences = [
            ("['pleural effusion']", "[['pleural effusion', 'loc left', 'loc basal']]"),
            ("['normal']", "[['normal']]"),
            ("['cardiomegaly', 'pacemaker']", "[['cardiomegaly'], ['pacemaker']]"),
        ][i % 3]
        for j, projection in enumerate(("PA" if i % 2 else "AP_horizontal", "L")):
            name = f"{i}_{j}.png"
            film(root / "3" / name, 10 * i + j, mode="16", view=("frontal", "lateral")[j])
            row = dict(
                ImageID=name, ImageDir=3, StudyDate_DICOM=20120304, StudyID=1000 + i, PatientID=f"p{i // 2}"
            )
            row |= dict(PatientBirth=1930.0 + 4 * i, PatientSex_DICOM="FM"[i % 2], Projection=projection)
            row |= dict(
                Report="derram pleural izquierd .", Labels=names, LabelsLocalizationsBySentence=sentences
            )
            rows.append({"": i} | row)
    write_csv(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", rows)
    return root


def rexgradient(root, n=12):
    "metadata/{train,valid,test}_metadata_view_position.json and deid_png/."
    (root / "metadata").mkdir(parents=True)
    parts = dict(train={}, valid={}, test={})
    for i in range(1, n + 1):
        findings, impression = texts(i)
        paths = [f"../deid_png/GRDN{i // 2}/{i}/{j}.png" for j in (0, 1)]
        for j, path in enumerate(paths):
            film(root / path.removeprefix("../"), 10 * i + j, view=("frontal", "lateral")[j])
        entry = dict(StudyInstanceUid=f"1.2.{i}", PatientAge=f"{20 + i:03d}Y", PatientSex="FM"[i % 2])
        entry |= dict(Indication="Cough.", Comparison="None.", Findings=findings, Impression=impression)
        entry |= dict(ImagePath=paths, ImageViewPosition=["PA" if i % 2 else "ANTERO_POSTERIOR", "LATERAL"])
        parts[list(parts)[(i // 2) % 3]][f"GRDN{i // 2}_a{i}_1.2.{i}"] = entry
    for part, entries in parts.items():
        (root / f"metadata/{part}_metadata_view_position.json").write_text(json.dumps(entries))
    return root


def table(root, n=12, kind="csv"):
    "A user's own table beside its images."
    rows = []
    for i in range(1, n + 1):
        findings, impression = texts(i)
        names = (f"img/{i}.png", f"img/{i}.jpg")
        film(root / names[0], 10 * i, mode="16" if i % 2 else "L")
        film(root / names[1], 10 * i + 1, view="lateral")
        rows.append(
            dict(
                study_id=f"study{i}",
                patient_id=f"patient{i // 2}",
                split=("train", "val", "test")[(i // 2) % 3],
                image=";".join(names),
                view="PA;LATERAL",
                findings=findings,
                impression=impression,
                report="",
            )
        )
    if kind == "csv":
        write_csv(root / "mine.csv", rows)
    else:
        (root / "mine.jsonl").write_text(
            "\n".join(json.dumps(r | dict(image=r["image"].split(";"))) for r in rows) + "\n"
        )
    return root / f"mine.{kind}"


def read_csv(path):
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else open(path, newline="") as f:
        return list(csv.DictReader(f))


def write_csv(path, rows):
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else open(path, "w", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
