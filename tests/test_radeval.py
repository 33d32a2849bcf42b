"""RadEval's metrics through their door: a package of the same shape is always tested, RadEval itself where
`make scorers` built its environment (or VALOR_RADEVAL names one)."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from valor.cli import main
from valor.metrics import evaluate as ev
from valor.metrics.statistics import GAUGE_NAMES, REGISTERED
from valor.rewards.outside import RadEval, radeval_python
from valor.rewards.text import scorer

PACKAGE = {
    "nltk.py": "def download(*names): raise OSError('no network')\n",
    "radeval/__init__.py": "",
    "radeval/metrics/__init__.py": "",
    "radeval/metrics/_registry.py": """
import os, nltk
class Stub:
    def __init__(self, name, **options):
        nltk.download("punkt_tab")      # as RadEval's metrics do
        self.name, self.options = name, options
    def compute(self, refs, hyps, per_sample):
        assert per_sample
        if self.name == "radcliq":      # depends on all references, as IDF weights do
            return {"radcliq_v1": [len(h) / sum(map(len, refs)) for h in hyps]}
        if self.name == "crimson":
            return {"crimson": [float("nan") if "odd" in h else 0.5 for h in hyps]}
        home = os.environ["HF_HOME"]
        assert os.environ["NLTK_DATA"].startswith(home) and os.environ["HF_HUB_OFFLINE"] == "1"
        same = [float(h == r) for h, r in zip(hyps, refs)]
        return {"srrbert_weighted_f1": same, "temporal_f1": [1.0] * len(refs)}
def get_metric_class(name):
    return lambda **options: Stub(name, **options)
""",
}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    "A Python that finds a package of RadEval's shape, although it is started with -I."
    home = tmp_path_factory.mktemp("radeval")
    for name, text in PACKAGE.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    program = home / "python"
    program.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={home} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def pairs(tmp_path):
    rows = [dict(id=i, candidate="a" * (i % 3 + 1), reference="aa") for i in range(70)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "weights").mkdir()
    return tmp_path


def run(pairs, *more):
    options = ["--n-boot", "20", "--out", str(pairs / "out"), *more]
    main(["evaluate", str(pairs / "pairs.jsonl"), *options])
    return pd.read_csv(pairs / "out/table.csv").set_index("metric").value


def test_metrics_are_rows_of_the_table(pairs, python, monkeypatch):
    monkeypatch.setenv("VALOR_RADEVAL", python)
    table = run(
        pairs, "--metrics", "srrbert,temporal,radcliq,crimson", "--set", f"radeval={pairs / 'weights'}"
    )
    assert table["SRR-BERT F1"] == pytest.approx(23 / 70, abs=1e-5)
    assert table["temporal F1"] == 1 and table["CRIMSON"] == 0.5
    # all 70 references at once, not 64 and 6: 139 letters over 140
    assert table["RadCliQ-v1"] == pytest.approx(139 / 140 / 70, rel=1e-4)
    assert (pairs / "out/scores/srrbert.jsonl").exists() and not (pairs / "out/scores/radcliq.jsonl").exists()


def test_radcliq_is_lower_for_better_and_never_in_a_table_that_does_not_ask(pairs):
    assert REGISTERED["RadCliQ-v1"].higher_is_better is False
    table = run(pairs, "--metrics", "lexical")
    assert not {"RadCliQ-v1", "SRR-BERT F1", "CRIMSON", "temporal F1"} & set(table.index)
    assert not set(ev.RADEVAL) & set(ev.asked_for(None, ev.DEFAULTS)[0])


def test_without_weights_the_row_says_what_it_wants(pairs, capsys):
    run(pairs, "--metrics", "lexical,radcliq")
    said = capsys.readouterr().out
    assert "not run: radcliq; wants --set radeval=FOLDER" in said and "RRG_scorers" in said


@pytest.mark.parametrize(
    "folder, says", [("weights", "RadEval is not installed for"), ("none", "no such folder")]
)
def test_a_missing_package_or_folder_is_one_line_before_anything_is_scored(pairs, folder, says, monkeypatch):
    monkeypatch.setenv("VALOR_RADEVAL", sys.executable)
    with pytest.raises(SystemExit, match=says) as end:
        run(pairs, "--metrics", "lexical,srrbert", "--set", f"radeval={pairs / folder}")
    assert "\n" not in str(end.value) and not (pairs / "out/table.csv").exists()


def test_one_registration_adds_a_metric(pairs, python, monkeypatch):
    monkeypatch.setenv("VALOR_RADEVAL", python)
    before = dict(REGISTERED), dict(ev.GAUGES), dict(ev.RADEVAL), list(GAUGE_NAMES), list(ev.ON_REQUEST)
    ev.register_radeval(ev.RadEvalMetric("mine", "another", "temporal_f1", "nothing"))
    try:
        assert run(pairs, "--metrics", "mine", "--set", f"radeval={pairs / 'weights'}")["mine"] == 1
    finally:
        for known, old in zip((REGISTERED, ev.GAUGES, ev.RADEVAL), before):
            known.clear()
            known.update(old)
        GAUGE_NAMES[:], ev.ON_REQUEST[:] = before[3:]


def test_a_number_that_is_none_and_a_wrong_key_are_said(tmp_path, python):
    with RadEval("crimson", "crimson", tmp_path, python=python, timeout=60) as judge:
        assert judge.score(["fine"], ["x"]) == [0.5]
        with pytest.raises(RuntimeError, match="failed on 1 pair"):
            judge.score(["fine", "odd"], ["x", "x"])
    with RadEval("crimson", "f1", tmp_path, python=python, timeout=60) as judge:
        with pytest.raises(RuntimeError, match=r"no 'f1' among \['crimson'\]"):
            judge.score(["fine"], ["x"])


try:
    REAL = radeval_python()
except ValueError:
    REAL = None


@pytest.mark.skipif(REAL is None, reason="`make scorers` builds RadEval's environment")
def test_srrbert_is_what_radeval_says_when_it_is_called_directly(tmp_path):
    make = [REAL, "-I", str(Path(__file__).parent / "radeval_weights.py"), str(tmp_path)]
    subprocess.run(make, check=True, capture_output=True)
    texts = ["the heart is enlarged .", "no pleural effusion .", "small left nodule . the lungs are clear ."]
    candidates, references = texts + texts[:2], [texts[1], texts[1], texts[0], texts[2], texts[0]]
    given = dict(metric="srrbert", key="srrbert_weighted_f1", weights=tmp_path, python=REAL)
    with scorer("radeval", **given) as judge:
        found = judge.score(candidates, references)
    code = (
        "import os, sys, json, nltk\nnltk.download = lambda *a, **k: True\n"
        "from radeval.metrics._registry import get_metric_class\n"
        "c, r = json.load(sys.stdin)\nm = get_metric_class('srrbert')()\n"
        "print(json.dumps(m.compute(refs=r, hyps=c, per_sample=True)['srrbert_weighted_f1']))"
    )
    from valor.rewards.outside import OFFLINE, radeval_caches

    said = subprocess.run(
        [REAL, "-I", "-c", code],
        input=json.dumps([candidates, references]),
        env=OFFLINE | radeval_caches(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found == pytest.approx(json.loads(said.stdout.splitlines()[-1])) and len(set(found)) > 2
