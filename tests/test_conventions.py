"""Label F1 by the name of a convention: `--convention`, beside scikit-learn's numbers."""

import json
import random

import pandas as pd
import pytest
from sklearn.metrics import f1_score

from valor.cli import main
from valor.config import figures_dir
from valor.metrics import conventions as cv
from valor.metrics.evaluate import evaluate
from valor.metrics.statistics import METRICS, REGISTERED
from valor.rewards.chexbert import FIVE
from valor.rewards.rules import RuleLabeler
from valor.vocabulary import OBSERVATIONS

PHRASES = [
    "the heart is enlarged .",
    "possible pneumonia .",
    "no pleural effusion .",
    "small left pleural effusion .",
    "possible atelectasis .",
    "a port is seen .",
    "the lungs are clear .",
]


@pytest.fixture
def pairs(tmp_path):
    rng, rows = random.Random(0), []
    for i in range(80):
        candidate, reference = (" ".join(rng.choices(PHRASES, k=3)) for _ in "ab")
        rows.append(dict(id=i, candidate=candidate, reference=reference))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl", rows


def command(path, out, *more):
    options = ["--out", str(out), "--metrics", "lexical", "--n-boot", "50", *more]
    main(["evaluate", str(path), *options])
    return pd.read_csv(out / "table.csv").set_index("metric").value


def test_the_rows_are_scikit_learns(pairs, tmp_path, capsys):
    path, rows = pairs
    table = command(path, tmp_path / "out", "--convention", "r2gen,radeval")
    said, true = (RuleLabeler().labels([row[side] for row in rows]) for side in ("candidate", "reference"))

    def f1(positive, names, average):
        return f1_score(
            true[names].isin(positive), said[names].isin(positive), average=average, zero_division=0
        )

    expected = {
        "F1 r2gen, micro 14": f1([1], OBSERVATIONS, "micro"),
        "F1 r2gen, macro 14": f1([1], OBSERVATIONS, "macro"),
        "F1 radeval, micro 5": f1([1, -1], FIVE, "micro"),
        "F1 radeval, macro 14": f1([1, -1], OBSERVATIONS, "macro"),
        "F1 radeval, weighted 14": f1([1, -1], OBSERVATIONS, "weighted"),
    }
    for name, value in expected.items():
        assert table[name] == pytest.approx(value, abs=1e-5), name
    assert not any(name.startswith("F1 miura") for name in table.index)
    shown = capsys.readouterr().out
    assert "F1 r2gen: uncertain is negative, 0/0 is zero" in shown
    kept = (tmp_path / "out/scores/f1.jsonl").read_text()
    assert "said Edema" in kept and "pneumonia" not in kept and "effusion" not in kept  # labels, no texts


def test_the_repositorys_own_convention_is_its_tables(pairs, tmp_path):
    path, _ = pairs
    table, _ = evaluate([path], tmp_path / "out", ["chexbert"], n_boot=50, convention="valor")
    table = table.set_index("metric").value
    ours = {
        "micro 14": "micro F1",
        "macro 14": "macro F1",
        "micro 5": "micro F1 (5)",
        "macro 5": "macro F1 (5)",
    }
    for theirs, name in ours.items():
        assert table[f"F1 valor, {theirs}"] == table[f"label {name}"]


def test_without_a_convention_the_table_is_as_it_was(pairs, tmp_path):
    path, _ = pairs
    table = command(path, tmp_path / "out")
    assert not any(name.startswith("F1") for name in table.index)
    assert not any(name.startswith("F1") for name in METRICS)
    assert not (tmp_path / "out/scores/f1.jsonl").exists()


def test_an_unknown_convention_is_one_line_before_anything_is_scored(pairs, tmp_path):
    path, _ = pairs
    with pytest.raises(SystemExit, match="convention='chexpert': allowed are r2gen, miura, radeval") as end:
        command(path, tmp_path / "out", "--convention", "chexpert")
    assert "\n" not in str(end.value) and not (tmp_path / "out").exists()


def test_one_registration_adds_a_convention(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cv, "CONVENTIONS", dict(cv.CONVENTIONS))
    before = dict(REGISTERED)
    cv.register_convention(cv.Convention("mine", "ignored", "one", (("example", 5),), "me"))
    try:
        table = command(pairs[0], tmp_path / "out", "--convention", "mine")
        assert 0 < table["F1 mine, example 5"] < 1
    finally:
        REGISTERED.clear()
        REGISTERED.update(before)


def test_the_committed_table_has_numbers_and_no_text():
    table = pd.read_csv(figures_dir() / "f1_conventions.csv", keep_default_na=False)
    assert set(table.system) == {"nearest film", "normal report", "random report"} and len(table) == 3 * 72
    assert set(table.studies) == {2357} and table.value.astype(float).between(0, 1).all()
