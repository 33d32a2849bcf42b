"""Wrong parameters fail fast and by name; no candidate, however odd, crashes a reward."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from valor.rewards.text import scorer

BAD = [
    ("lambda_vis=1.2", "lambda_vis=1.2 is not allowed; expected a number in [0, 1]"),
    ("lambda_clin=-0.1", "lambda_clin=-0.1"),
    ("lambda_lex=0.9", "expected 1 (Eq. 3)"),
    ("group_size=1", "group_size=1 is not allowed; expected a number >= 2"),
    ("lambda_viz=0.5", "unknown parameter lambda_viz=0.5"),
    ("k_clin=often", "k_clin='often' is a str; expected int or None"),
    ("benchmark=mimic", "benchmark='mimic'"),
    ("lambda_vis", "expected name=value"),
    ("chexbert=foo", "chexbert='foo'"),
    ("base=/no/such", "no such folder"),
    ("lambda_clin=Infinity", "lambda_clin=inf"),
]


@pytest.mark.parametrize("setting,message", BAD)
def test_command_line_names_parameter_value_and_what_is_allowed(setting, message, tmp_path, monkeypatch):
    from valor.cli import main

    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    with pytest.raises(SystemExit) as e:
        main(["run", "--preset", "smoke", "--set", setting])
    assert message in str(e.value)
    assert not (tmp_path / "runs").exists()  # before anything was started


SCORERS = {n: scorer(n) for n in ("bleu4", "rouge_l", "bertscore", "chexbert", "radgraph", "format")}
REFERENCE = "findings: the heart is enlarged. no effusion. impression: cardiomegaly."
odd = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            "",
            " ",
            "<report>",
            "</report><report>",
            "<report></report>",
            "é ünï 心臓 🫀",
            "no " * 3000,
            "<report> ok </report> tail",
        ]
    ),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(odd, min_size=1, max_size=4))
def test_every_candidate_is_scored(candidates):
    for name, s in SCORERS.items():
        scores = s.score(candidates, [REFERENCE] * len(candidates))
        assert len(scores) == len(candidates)
        assert all(isinstance(x, float) and -1 <= x <= 1.0001 for x in scores), (name, scores)


def test_a_perfect_candidate_beats_an_odd_one():
    for name, s in SCORERS.items():
        best, worst = s.score([f"<report> {REFERENCE} </report>", "🫀"], [REFERENCE] * 2)
        assert best > worst, name
