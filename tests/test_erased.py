"""Pairs of films that differ in one finding: what stays the same, and what two reports of a pair say."""

import numpy as np
import pytest

from valor.data.pairs import erased_pairs, region, render_without
from valor.data.phantom import (
    PHANTOM_NAMES,
    SEVERITIES,
    Finding,
    make_phantom,
    render,
    sample_findings,
)
from valor.metrics.erased import COLUMNS, MEASURES, erased_table, pair_columns, pair_frame
from valor.metrics.statistics import perfect_findings

SHAPES = ("cardiomegaly", "atelectasis")  # the anatomy of the others would be another without them


def planted(first, n):
    "(truth, number of a finding, seed) of every finding in `n` studies."
    for seed in range(first, first + n):
        truth = sample_findings(np.random.default_rng(seed))
        yield from ((truth, which, seed) for which in range(len(truth)))


@pytest.mark.parametrize("size", [64, 96, 128])
def test_nothing_changes_outside_the_region_and_others_keep_their_boxes(size):
    erased = set()
    for truth, which, seed in planted(1000 * size, 40):
        image, boxes = render(truth, seed, size)
        without, left = render_without(truth, which, seed, size)
        changed = image != without
        assert changed.any() and not changed[~region(truth[which], boxes[which], size)].any(), truth[which]
        assert left == boxes[:which] + boxes[which + 1 :]
        erased.add(truth[which].name)
    assert erased == set(PHANTOM_NAMES)


def test_an_erased_finding_leaves_nothing_behind():
    "A study whose only finding is erased is a healthy one; the last one erased leaves those before it."
    for truth, which, seed in planted(0, 60):
        f = truth[which]
        assert np.array_equal(render_without([f], 0, seed)[0], render([], seed)[0]), f
        # a tube's side is drawn before anything is painted, so without a tube there are other numbers
        if which == len(truth) - 1 and f.name not in SHAPES and f.kind != "endotracheal tube":
            assert np.array_equal(render_without(truth, which, seed)[0], render(truth[:-1], seed)[0]), truth


@pytest.mark.parametrize("severity", SEVERITIES)
def test_what_is_left_is_seen_as_clearly_as_before(severity):
    "The film without one finding differs from the healthy patient where the other one is."
    nodule, other = Finding("nodule", "left", "upper"), Finding("effusion", "right", severity=severity)
    both, boxes = render([other, nodule], 3)
    without, _ = render_without([other, nodule], 0, 3)
    mask = region(nodule, boxes[1])
    assert np.array_equal(both[mask], without[mask])
    assert (without[mask] != render([], 3)[0][mask]).any()


def test_pairs_do_not_depend_on_how_many_are_asked_for():
    studies = make_phantom(20, 5, "test", size=64)
    everything = erased_pairs(studies).to_list()
    assert erased_pairs(studies, 4).to_list() == everything[:4]
    assert {p["study_id"] for p in everything} == {r["study_id"] for r in studies if r["truth"]}


NODULE = Finding("nodule", "right", "upper")
LEFT = "small left pleural effusion."


@pytest.mark.parametrize(
    "complete, without, ones",
    [
        (f"nodule in the right upper lobe. {LEFT}", LEFT, "found placed gone left others exactly"),
        (f"nodule in the left lower lobe. {LEFT}", LEFT, "found gone left others exactly"),
        (f"nodule in the right upper lobe. {LEFT}", "", "found placed gone left"),
        (
            f"nodule in the right upper lobe. {LEFT}",
            "small right pleural effusion.",
            "found placed gone left",
        ),
        (LEFT, f"nodule in the right upper lobe. {LEFT}", "others invented"),
        (f"no suspicious nodule. {LEFT}", f"{LEFT} pulmonary edema.", "gone invented"),
        ("", "", "gone others"),
    ],
)
def test_reports_of_a_pair(complete, without, ones):
    numbers = pair_columns(complete, without, NODULE, [Finding("effusion", "left", severity="mild")])
    assert {c for c, n in zip(COLUMNS, numbers) if n} == set(ones.split()) and set(numbers) <= {0.0, 1.0}


def test_shares_are_of_what_they_say_and_seeds_average():
    studies = make_phantom(30, 2, "test", size=64)
    pairs = erased_pairs(studies)
    whole, less = perfect_findings(studies.select(pairs["row"])), perfect_findings(pairs)
    sees, blind = pair_frame(whole, less, pairs), pair_frame(whole, whole, pairs)
    table = erased_table({"half": {0: sees, 1: blind}}, 100).set_index("measure").value
    # of a blind reader's reports none is without the finding, so nothing can come back: undefined
    assert list(table.index) == list(MEASURES) and np.isnan(table["came back"])
    expected = {"found": 1, "gone": 0.5, "exactly": 0.5, "left when found": 0.5, "invented on erasure": 0}
    assert {m: table[m] for m in expected} == expected
