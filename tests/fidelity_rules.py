"""Measures how well the rules replace the real CheXbert and RadGraph: writes figures/fidelity_rules.csv, with
its record beside it.

    VALOR_REAL=<folder that holds iu_xray/ and real_iu/> python tests/fidelity_rules.py

No text of a report is written. Labels are compared on R2Gen's train and val reports of IU X-Ray, each with
the real CheXbert's labels; entities on systems' test reports, each pair with the real RadGraph's F1."""

import json
import os
import sys
from pathlib import Path

import pandas as pd
from scipy.stats import spearmanr

from valor.figures import save
from valor.rewards.radgraph import graph_set
from valor.rewards.rules import RuleGraph, RuleLabeler, set_f1
from valor.vocabulary import OBSERVATIONS

ROOT = Path(__file__).resolve().parents[1]
LEVELS = {"simple": "rg_e", "partial": "rg_er", "complete": "rg_bar_er"}  # ours: the real RadGraph's


def scores(name, read, true):
    "A row: `read` and `true` are boolean frames (report x observation); n counts what is true."
    both, said, is_true = (read & true).to_numpy().sum(), read.to_numpy().sum(), true.to_numpy().sum()
    return dict(
        measure="labels",
        name=name,
        n=int(is_true),
        precision=both / said,
        recall=both / is_true,
        f1=2 * both / (said + is_true),
    )


def label_rows(place):
    "Agreement with the real CheXbert's labels, present or uncertain, per observation and over all."
    annotation = json.loads((place / "iu_xray" / "annotation.json").read_text())
    texts = {study["id"]: study["report"] for part in annotation.values() for study in part}
    table = pd.read_csv(place / "iu_xray" / "chexbert_train_val.csv").set_index("id")
    table = table.loc[[i for i in table.index if i in texts]]
    true = table[OBSERVATIONS].isin([1, -1])
    read = RuleLabeler().labels([texts[i] for i in table.index]).isin([1, -1]).set_index(table.index)
    rows = [scores(o, read[[o]], true[[o]]) for o in OBSERVATIONS]
    rows += [
        scores("micro without No Finding", read[OBSERVATIONS[:13]], true[OBSERVATIONS[:13]]),
        scores("micro", read, true),
    ]
    return [dict(measure="labels", name="reports", n=len(table)), *rows]


def entity_rows(name, texts, real):
    "Spearman's correlation with `real`, the real RadGraph's F1 per pair, at each level."
    graphs = {side: RuleGraph().graphs(texts[side]) for side in texts}
    rows = []
    for level, key in LEVELS.items():
        pairs = zip(graphs["candidate"], graphs["reference"])
        ours = [set_f1(graph_set(c, level), graph_set(r, level)) for c, r in pairs]
        rho = spearmanr(ours, [scores[key] for scores in real])[0]
        rows.append(dict(measure="entities", name=f"{name} {level}", n=len(ours), spearman=rho))
    return rows


def micro_rows(name, texts, real):
    "Micro-F1 by the rules, and by the real CheXbert from its counts `real` per observation."
    said = {side: RuleLabeler().labels(texts[side]).isin([1, -1]) for side in texts}
    both = (said["candidate"] & said["reference"]).to_numpy().sum()
    all_said = sum(labels.to_numpy().sum() for labels in said.values())
    counts = {kind: sum(row[kind] for row in real.values()) for kind in ("tp", "fp", "fn")}
    f1 = 2 * counts["tp"] / (2 * counts["tp"] + counts["fp"] + counts["fn"])
    n = len(texts["candidate"])
    return [
        dict(measure="system", name=f"{name} by the rules", n=n, f1=2 * both / all_said),
        dict(measure="system", name=f"{name} by CheXbert", n=n, f1=f1),
    ]


def system_rows(place):
    """Rows of each system in `real_iu`, where its file has the real model's results.

    Spearman's correlation of our and the real RadGraph's F1; micro-F1 by the rules and by CheXbert."""
    rows = []
    for path in sorted((place / "real_iu").glob("*.json")):
        held = json.loads(path.read_text())
        name = path.stem.removeprefix("iu_test_")
        texts = {side: [pair[side] for pair in held["pairs"]] for side in ("candidate", "reference")}
        if "radgraph" in held["pairs"][0]:
            rows += entity_rows(name, texts, [pair["radgraph"] for pair in held["pairs"]])
        if "chexbert" in held:
            rows += micro_rows(name, texts, held["chexbert"])
    return rows


if __name__ == "__main__":
    if not os.environ.get("VALOR_REAL"):
        sys.exit("set VALOR_REAL: the folder that holds iu_xray/ and real_iu/")
    place = Path(os.environ["VALOR_REAL"])
    table = pd.DataFrame(label_rows(place) + system_rows(place))
    note = "rules beside the labels and scores of the real CheXbert and RadGraph on reports of IU X-Ray"
    save("fidelity_rules", table.round(4), note=note, out=ROOT / "figures")
    print(table.round(3).to_string(index=False))
