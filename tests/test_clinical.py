"""Properties that hold whatever the weights.

Checked on CheXbert and RadGraph with made-up weights in the true format, and on the embedded rules."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from valor.rewards.chexbert import LabelF1
from valor.rewards.radgraph import LEVELS, EntityF1
from valor.testing import miniature_chexbert, miniature_radgraph

WORDS = (
    "the heart is enlarged no pleural effusion . , or small left right nodule in upper lobe lungs are clear "
    "possible pneumonia"
).split()
report = st.lists(st.sampled_from(WORDS), min_size=1, max_size=25).map(" ".join)
anything = st.one_of(
    report,
    st.text(max_size=30),
    st.sampled_from(["", "\x00\x1b[31m", "气胸 左侧", "<report> a </report>", '"quoted" \\n x/y (new)']),
)
pairs = st.lists(st.tuples(anything, anything), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    chexbert, (radgraph, _) = miniature_chexbert(folder), miniature_radgraph(folder)
    return {
        "chexbert": LabelF1(model=chexbert, device="cpu"),
        "chexbert rules": LabelF1(),
        "chexbert 5": LabelF1(model=chexbert, observations=5, uncertain="class", device="cpu"),
        **{f"radgraph {level}": EntityF1(model=radgraph, level=level, device="cpu") for level in LEVELS},
        **{f"rules {level}": EntityF1(level=level) for level in LEVELS},
    }


@settings(max_examples=20, deadline=None)
@given(pairs=pairs, randomness=st.randoms())
def test_range_symmetry_order_and_company(judges, pairs, randomness):
    candidates, references = map(list, zip(*pairs))
    order = randomness.sample(range(len(pairs)), len(pairs))
    for name, judge in judges.items():
        scores = judge.score(candidates, references)
        assert all(0 <= s <= 1 for s in scores), name
        assert judge.score(references, candidates) == scores, name
        assert judge.score([candidates[i] for i in order], [references[i] for i in order]) == [
            scores[i] for i in order
        ], name
        assert [judge.score([c], [r])[0] for c, r in pairs] == scores, name
        assert judge.score(references, references) == [1.0] * len(pairs), name


@settings(max_examples=15, deadline=None)
@given(report, report)
def test_detail_agrees_with_the_score(judges, a, b):
    for name, judge in judges.items():
        (record,) = judge.detail([a], [b])
        assert record["score"] == judge.score([a], [b])[0], name
        assert all(
            0 <= start <= end <= len(record["text"]) and 0 <= support <= 1
            for start, end, support in record["spans"]
        ), name
        if record["score"] == 1 and "5" not in name:
            assert record["missing"] == [], name


def test_batch_size_never_changes_a_score(judges):
    rng = random.Random(0)
    reports = [" ".join(rng.choices(WORDS, k=rng.choice([1, 3, 10, 60]))) for _ in range(40)] + [
        "effusion " * 10_000
    ]
    for name in ("chexbert", "radgraph partial"):
        judge, backend = judges[name], getattr(judges[name], "labeler", None) or judges[name].reader
        attribute, sizes = ("batch_size", (1, 8, 32)) if name == "chexbert" else ("budget", (1, 2000, 40_000))
        seen = []
        texts = reports if name == "chexbert" else reports[:-1]
        for size in sizes:
            setattr(backend, attribute, size)
            judge.kept.clear()
            seen.append(judge.score(texts, texts[::-1]))
        assert seen[0] == seen[1] == seen[2], name


def test_ten_thousand_words_and_other_scripts_are_quick(judges):
    for name in ("chexbert rules", "rules partial"):
        for text in (
            "effusion " * 10_000,
            "no " * 10_000,
            "胸" * 20_000,
            "\x00" * 20_000,
            "a" * 50_000,
            "no effusion , " * 5_000,
        ):
            assert math.isfinite(judges[name].score([text], ["no effusion ."])[0])
