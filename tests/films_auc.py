"""What the embedded policy's tower and the multi-label expert see on real films: areas under the ROC curve
on the validation studies, of a linear head on the tower's mean vector and of the expert's probabilities. By
hand, a minute a seed once base and expert are trained; writes figures/films_auc_BENCHMARK.csv, in which the
rows of seeds that were measured earlier stay.

`--labels`: a table with one row a study (column `id`) and CheXbert's own labels; without it the labels are
those of the data.

python tests/films_auc.py 0,1 --set benchmark=r2gen_iu --set data_root=FOLDER --labels FILE.csv"""

import argparse

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from valor.config import Config, figures_dir, parse_settings, preset
from valor.figures import save
from valor.policy.films import FilmTower
from valor.runs.makers import note_of, open_expert, policy_of
from valor.runs.phases import ensure, load_data, phase_folder
from valor.vocabulary import OBSERVATIONS

OBSERVED = ["Cardiomegaly", "Lung Opacity", "Atelectasis", "Pleural Effusion", "No Finding"]


def present(data: Dataset, labels: pd.DataFrame | None) -> np.ndarray:
    "Whether each study of `data` has each of `OBSERVED`, uncertain ones included: (N, 5) of 0 and 1."
    if labels is None:
        places = [OBSERVATIONS.index(name) for name in OBSERVED]
        return np.isin(np.array(data["labels"], float)[:, places], (1, -1)).astype(int)
    return labels.loc[data["study_id"], OBSERVED].isin((1, -1)).to_numpy().astype(int)


def vectors(data: Dataset, cfg: Config) -> np.ndarray:
    "The mean vector (N, D) that the base policy's tower gives each film."
    model, processor = policy_of("base", cfg)
    tower = next(part for part in model.eval().modules() if isinstance(part, FilmTower))
    found = []
    for start in range(0, len(data), 64):
        films = [image.convert("RGB") for image in data[start : start + 64]["image"]]
        pixels = processor.image_processor(images=films, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            found.append(tower(pixels).last_hidden_state[:, 0].numpy())
    return np.concatenate(found)


def of_tower(data: dict[str, Dataset], cfg: Config, labels: pd.DataFrame | None) -> dict[str, float]:
    "{observation: AUC on val} of a logistic regression on `vectors`, fitted on train."
    train, val = vectors(data["train"], cfg), vectors(data["val"], cfg)
    known, asked = present(data["train"], labels), present(data["val"], labels)
    areas = {}
    for i, name in enumerate(OBSERVED):
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        areas[name] = roc_auc_score(asked[:, i], head.fit(train, known[:, i]).predict_proba(val)[:, 1])
    return areas


def of_expert(data: dict[str, Dataset], cfg: Config, labels: pd.DataFrame | None) -> dict[str, float]:
    "{observation: AUC on val} of the expert's probabilities."
    expert, val = open_expert(phase_folder("expert", cfg), cfg).inner, data["val"]
    said = np.concatenate([expert.classify(val[i : i + 64]["image"]).numpy() for i in range(0, len(val), 64)])
    asked = present(val, labels)
    columns = [expert.observations.index(name) for name in OBSERVED]
    return {name: roc_auc_score(asked[:, i], said[:, columns[i]]) for i, name in enumerate(OBSERVED)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--labels")
    args = parser.parse_args()
    labels = pd.read_csv(args.labels, index_col="id") if args.labels else None
    rows, cfgs = [], []
    for seed in map(int, args.seeds.split(",")):
        cfg = preset("laptop", seed=seed, **parse_settings(args.set))
        ensure("base", cfg), ensure("expert", cfg)
        data = load_data(phase_folder("data", cfg))
        for name, measured in (("policy's tower", of_tower), ("expert", of_expert)):
            areas = measured(data, cfg, labels)
            mean = np.mean(list(areas.values()))
            rows.append(dict(name=f"{name}, seed {seed}", seed=seed) | areas | dict(mean=mean))
            print(rows[-1], flush=True)
        cfgs.append(cfg)
    runs = [phase_folder(phase, cfg) for cfg in cfgs for phase in ("base", "expert")]
    note = f"{note_of(cfgs[0])}; labels of {'CheXbert' if args.labels else 'the data'}, validation studies"
    stem, table = f"films_auc_{cfgs[0].benchmark}", pd.DataFrame(rows).round(4)
    if (earlier := figures_dir() / f"{stem}.csv").exists():
        old = pd.read_csv(earlier)
        table = pd.concat([old[~old.name.isin(table.name)], table])
        table = table.sort_values("seed", kind="stable", ignore_index=True)
    save(stem, table, cfgs=cfgs, runs=runs, note=note, out=figures_dir())
