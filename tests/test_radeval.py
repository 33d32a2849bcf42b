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
from valor.rewards.outside import OFFLINE, RadEval, radeval_caches, radeval_python
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
            assert "odd" not in refs
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


def test_radcliq_of_a_system_does_not_depend_on_the_one_before_it(tmp_path, python):
    given = dict(metric="radcliq", key="radcliq_v1", weights=tmp_path, python=python, whole_set=True)
    with scorer("radeval", **given) as judge:
        # letters of the candidate over those of all references, also the empty pair's and the repeated ones'
        assert judge.score(["aa", "aa", ""], ["aa", "aa", "aaaa"]) == [2 / 8, 2 / 8, 0]
        assert judge.score(["aa", "b"], ["aa", "aa"]) == [2 / 4, 1 / 4]


def test_radcliq_that_fails_is_not_scored_in_parts(tmp_path, python):
    given = dict(metric="radcliq", key="radcliq_v1", weights=tmp_path, python=python, whole_set=True)
    with (
        scorer("radeval", **given) as judge,
        pytest.raises(RuntimeError, match="failed on 2 pair.*AssertionError"),
    ):
        judge.score(["a", "b"], ["aa", "odd"])


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


real = pytest.mark.skipif(REAL is None, reason="`make scorers` builds RadEval's environment")
DIRECT = """
import json, sys
import nltk
nltk.download = lambda *a, **k: True  # no network in a test
import radeval
sys.modules["RadEval"] = radeval  # RadEval 2.2.1 calls itself by a name that Linux does not find
if sys.argv[1] == "temporal":
    import stanza
    from functools import partial
    stanza.Pipeline = partial(stanza.Pipeline, download_method=None)
    stanza.download = lambda *a, **k: None
from radeval.metrics._registry import get_metric_class
metric = get_metric_class(sys.argv[1])()
for hyps, refs in json.load(sys.stdin):
    print(json.dumps(metric.compute(refs=refs, hyps=hyps, per_sample=True)))
    getattr(metric, "_scorer", metric)._bertscore_cache_key = None
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A folder of made-up weights for all four metrics."
    folder = tmp_path_factory.mktemp("weights")
    make = [REAL, "-I", str(Path(__file__).parent / "radeval_weights.py"), str(folder)]
    subprocess.run(make, check=True, capture_output=True)
    return folder


def direct(metric, key, weights, *sets):
    "What RadEval says of `sets`, each a list of candidates and one of references, without us."
    said = subprocess.run(
        [REAL, "-I", "-c", DIRECT, metric],
        input=json.dumps(sets),
        env=OFFLINE | radeval_caches(weights),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line)[key] for line in said.stdout.splitlines() if line.startswith("{")]


TEXTS = ["the heart is enlarged .", "no pleural effusion .", "new", "worse nodule", "stable"]
CANDIDATES = [TEXTS[i] for i in (3, 2, 4, 0, 1, 3)]
REFERENCES = [TEXTS[i] for i in (0, 1, 2, 0, 3, 1)]


@real
@pytest.mark.parametrize("metric, key", [("srrbert", "srrbert_weighted_f1"), ("crimson", "crimson")])
def test_numbers_are_what_radeval_says_when_it_is_called_directly(weights, metric, key, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/none")  # a cache of the user's, which is not ours
    given = dict(metric=metric, key=key, weights=weights, python=REAL, batch_size=4)
    with scorer("radeval", **given) as judge:
        found = judge.score(CANDIDATES, REFERENCES)
    theirs, turned = direct(metric, key, weights, (CANDIDATES, REFERENCES), (REFERENCES, CANDIDATES))
    assert found == pytest.approx(theirs) and len(set(found)) > 2
    # SRR-BERT's F1 is the same from both sides
    assert metric == "srrbert" or found != pytest.approx(turned)


@real
def test_temporal_f1_is_radevals_and_its_tagger_counts(weights):
    # RadEval's list of words finds nothing in "stableish"; of the made-up tagger's words it keeps "stable"
    candidates = ["stable'ish opacity", "worse'ish opacity", "stable heart", "new and worse", "clear"]
    references = ["stable opacity", "worse opacity", "worse heart", "worse , new and stable", "clear lungs"]
    given = dict(metric="temporal", key="temporal_f1", weights=weights, python=REAL)
    with scorer("radeval", **given) as judge:
        found = judge.score(candidates, references)
    assert found == pytest.approx(direct("temporal", "temporal_f1", weights, (candidates, references))[0])
    assert found == pytest.approx([1, 0, 0, 0.8, 1], abs=1e-6)


@real
def test_radcliq_is_radevals_for_each_set_of_references(weights):
    repeated = [*CANDIDATES, "", CANDIDATES[0]], [*REFERENCES, TEXTS[0], REFERENCES[0]]
    sets = [repeated, (CANDIDATES[:3], REFERENCES[:3])]
    given = dict(metric="radcliq", key="radcliq_v1", weights=weights, python=REAL, whole_set=True)
    with scorer("radeval", **given) as judge:
        found = [judge.score(*texts) for texts in sets]
    for ours, theirs in zip(found, direct("radcliq", "radcliq_v1", weights, *sets)):
        assert ours == pytest.approx(theirs, abs=1e-6) and len(set(ours)) > 2
    # an empty report is the worst, and a pair has another number among other references
    assert max(found[0]) == found[0][-2]
    assert found[0][:3] != pytest.approx(found[1], abs=1e-5)
