"""Properties of the text scores, rewards of your own, and a reward that breaks in the middle of a run."""

import importlib
import json
import math
import shutil
import sys

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from valor.cli import main
from valor.config import preset
from valor.metrics.evaluate import evaluate
from valor.rewards.compose import extras_of
from valor.rewards.guard import RewardError
from valor.rewards.text import SCORERS as SCORERS_OF_THE_PACKAGE
from valor.rewards.text import report_body, scorer, tokenize
from valor.runs.makers import text_scorers
from valor.runs.phases import ensure

WORDS = (
    "the heart is enlarged no pleural effusion . , or small left right nodule in upper lobe lungs are clear"
).split()
report = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join)
anything = st.one_of(
    report,
    st.text(max_size=40),
    st.sampled_from(["", "no " * 3_000, "\x00\x1b[31m", "气胸 左侧", "<report> a </report>"]),
)
pairs = st.lists(st.tuples(anything, anything), min_size=1, max_size=6)
SCORERS = {name: scorer(name) for name in ("bleu4", "rouge_l", "bertscore", "length", "repetition")}


@settings(max_examples=30, deadline=None)
@given(pairs)
def test_scores_are_finite_and_in_range(pairs):
    for name, judge in SCORERS.items():
        low, high = judge.range
        for score in judge.score(*map(list, zip(*pairs))):
            assert math.isfinite(score) and low - 1e-6 <= score <= high + 1e-6, (name, score)


@settings(max_examples=25, deadline=None)
@given(pairs, st.randoms())
def test_order_and_company_do_not_change_a_score(pairs, random):
    order = random.sample(range(len(pairs)), len(pairs))
    for name, judge in SCORERS.items():
        scores = judge.score(*map(list, zip(*pairs)))
        assert judge.score(*map(list, zip(*(pairs[i] for i in order)))) == pytest.approx(
            [scores[i] for i in order], abs=2e-6
        ), name
        assert [judge.score([c], [r])[0] for c, r in pairs] == pytest.approx(scores, abs=2e-6), name


@settings(max_examples=25, deadline=None)
@given(report, report)
def test_identity_is_the_maximum(a, b):
    for name in ("rouge_l", "bertscore", "length"):
        own, other = SCORERS[name].score([a, b], [a, a])
        assert own == pytest.approx(SCORERS[name].range[1], abs=2e-6) and other <= own + 2e-6, name
    if len(tokenize(a)) >= 4:  # under 4 tokens BLEU-4 has nothing to count: known, kept
        own, other = SCORERS["bleu4"].score([a, b], [a, a])
        assert own == pytest.approx(1, abs=1e-6) and other <= own + 1e-9
    forth, back = (SCORERS["bertscore"].score([x], [y])[0] for x, y in ((a, b), (b, a)))
    assert forth == pytest.approx(back, abs=2e-6)


@settings(max_examples=25, deadline=None)
@given(report, report)
def test_detail_agrees_with_the_score(a, b):
    for name in ("bleu4", "rouge_l", "bertscore"):
        (record,) = SCORERS[name].detail([f"<report> {a} </report>"], [b])
        assert record["score"] == SCORERS[name].score([a], [b])[0] and record["text"] == report_body(a)
        assert all(0 <= s < e <= len(record["text"]) and 0 <= x <= 1 for s, e, x in record["spans"])
        assert all(word in b.lower() for word in record["missing"])


OWN = """
from valor.rewards.text import Scorer

class Sides(Scorer):
    "Whether the same sides are named."
    name = "sides"
    def _score(self, pairs):
        sides = [[{"left", "right"} & set(text.split()) for text in pair] for pair in pairs]
        return [float(a == b) for a, b in sides]

def brevity(candidates, references): return [1 / (1 + len(c.split())) for c in candidates]
"""


def test_a_reward_of_ones_own_by_import_path_and_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "otherlab.py").write_text(OWN)
    info = tmp_path / "otherlab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: otherlab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[valor.scorers]\nlab_sides = otherlab:Sides\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert scorer("lab_sides").score(["left nodule"], ["nodule in the left lung"]) == [1.0]
    assert scorer("otherlab:brevity").score(["a b c"], [""]) == [0.25]
    with pytest.raises(ValueError, match="no option model='x'"):
        scorer("lab_sides", model="x")
    with pytest.raises(ValueError, match="takes no options"):
        scorer("otherlab:brevity", model="x")
    cfg = preset(
        "smoke", extra_rewards={"lab_sides": [4, 0.3], "otherlab:brevity": [8, 0.1]}, lambda_length=0.2
    )
    assert extras_of(cfg) == {"lab_sides": (4, 0.3), "otherlab:brevity": (8, 0.1), "length": (8, 0.2)}
    assert set(extras_of(cfg)) < set(text_scorers(cfg))


REGISTERED = """
from valor.rewards import register

@register("sides")
def sides(candidates, references):
    "Share of the sides that candidate and reference have in common."
    scores = []
    for texts in zip(candidates, references):
        said, true = ({"left", "right"} & set(text.split()) for text in texts)
        scores.append(len(said & true) / len(said | true) if said | true else 1.0)
    return scores
"""


def test_one_registration_reaches_scorer_training_and_evaluate(tmp_path, monkeypatch):
    assert len(REGISTERED.strip().splitlines()) <= 10
    monkeypatch.setattr("valor.rewards.text.SCORERS", dict(SCORERS_OF_THE_PACKAGE))
    exec(REGISTERED, {})
    pair = ("a small left effusion", "moderate left effusion , right nodule")
    assert scorer("sides").score([pair[0]], [pair[1]]) == [0.5]

    cfg = preset("smoke", extra_rewards={"sides": [4, 0.3]})
    assert text_scorers(cfg)["sides"].score([pair[0]], [pair[1]]) == [0.5]

    line = json.dumps({"id": "1", "candidate": pair[0], "reference": pair[1]})
    (tmp_path / "mine.jsonl").write_text(f"{line}\n")
    table, _ = evaluate([tmp_path / "mine.jsonl"], tmp_path / "out", ["sides"], n_boot=10)
    assert table.metric.tolist() == ["sides"] and table.value.tolist() == [0.5]


def test_a_command_knows_a_reward_by_its_place_and_scores_anew_after_an_edit(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "edited", None)
    line = json.dumps({"id": "1", "candidate": "a b", "reference": "a"})
    (tmp_path / "mine.jsonl").write_text(f"{line}\n")
    for value in (0.25, 0.75):
        (tmp_path / "edited.py").write_text(
            f"def same(candidates, references):\n    return [{value}] * len(candidates)\n"
        )
        sys.modules.pop("edited", None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        main(
            [
                "evaluate",
                f"{tmp_path}/mine.jsonl",
                "--out",
                f"{tmp_path}/out",
                "--metrics",
                "edited:same",
                "--n-boot",
                "10",
            ]
        )
        assert pd.read_csv(tmp_path / "out/table.csv").value.tolist() == [value]


BREAKS = """
from pathlib import Path
calls = 0

def tired(candidates, references):
    "Raises on its 5th batch, that of k=4 (the first is the trial before training), unless `mended` is there."
    global calls
    calls += 1
    if calls == 5 and not Path(__file__).with_name("mended").exists(): raise RuntimeError("out of coffee")
    return [len(c) / 1000 for c in candidates]

def odd(candidates, references): return [float("nan") if len(c) % 5 == 2 else .5 for c in candidates]
def never(candidates, references): return [float("nan")] * len(candidates)
"""


def test_a_reward_that_raises_names_itself_and_the_run_goes_on_once_it_is_mended(tmp_path, monkeypatch):
    (tmp_path / "shaky.py").write_text(BREAKS)
    monkeypatch.syspath_prepend(tmp_path)
    tiny = dict(n_train=24, n_test=8, base_studies=24, threads=1)
    weights = {}
    for folder, mended in (("whole", True), ("broken", False)):
        monkeypatch.setenv("VALOR_RUNS", str(tmp_path / folder))
        if mended:
            (tmp_path / "mended").touch()
        else:
            (tmp_path / "mended").unlink()
        sys.modules.pop("shaky", None)
        cfg = preset("smoke", extra_rewards={"shaky:tired": [8, 0.5], "shaky:odd": [8, 0.1]}, **tiny)
        if not mended:
            with pytest.raises(RewardError, match=r"reward 'shaky:tired' failed at k=4.*out of coffee"):
                ensure("stage1", cfg)
            (tmp_path / "mended").touch()
        out = ensure("stage1", cfg)
        weights[folder] = load_file(out / "adapter" / "adapter_model.safetensors")
        assert pd.read_csv(out / "log.csv")["k"].tolist() == [1, 2, 3, 4]
    assert all((weights["whole"][n] == weights["broken"][n]).all() for n in weights["whole"])
    with pytest.raises(RewardError, match=r"'shaky:never': 5 of 5 trial scores are not finite"):
        ensure("stage1", preset("smoke", extra_rewards={"shaky:never": [8, 0.5]}, **tiny))
