"""Equations, seeds and counts against numbers by hand.

No two weights are equal, so that a weight that is dropped, doubled or swapped shows; tests/mutants.py does
just that."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from valor.config import preset
from valor.data import phantom
from valor.data.phantom import Finding
from valor.metrics import statistics as ev
from valor.metrics.bootstrap import study_draws
from valor.metrics.convergence import FORMAT, not_converged
from valor.metrics.evaluate import tidy_table
from valor.results import attention, tables
from valor.rewards.chexbert import LabelF1
from valor.rewards.compose import advantages
from valor.train import grpo
from valor.train.grpo import Rewards, Stage, ValorTrainer, align, make_trainer

SCORES = dict(
    bleu4=[0.11, 0.23, 0.05, 0.31],
    rouge_l=[0.42, 0.13, 0.27, 0.36],
    bertscore=[0.71, 0.83, 0.64, 0.59],
    chexbert=[0.2, 0.9, 0.4, 0.6],
    radgraph=[0.7, 0.1, 0.5, 0.3],
    format=[1, 0, 1, 1],
    similarity=[0.3, 0.8, 0.1, 0.6],
    third=[0.9, 0.2, 0.6, 0.1],
    fourth=[0.1, 0.8, 0.3, 0.7],
    eighth=[0.6, 0.5, 0.2, 0.9],
)
WEIGHTS = dict(
    lambda_lex=0.3,
    lambda_sem=0.7,
    lambda_clin=0.9,
    lambda_cx=0.2,
    lambda_rg=0.6,
    lambda_format=0.11,
    k_clin=3,
)


def settings(**change):
    "A configuration with unequal weights and one reward more in each of Eq. 3, 4 and 8."
    return SimpleNamespace(
        **vars(preset("smoke", **WEIGHTS, **change))
        | dict(extra_rewards=dict(third=[3, 0.4], fourth=[4, 0.25], eighth=[8, 0.15]))
    )


@pytest.mark.parametrize("k,lambda_vis", [(1, 0.0), (3, 0.0), (2, 0.35), (6, 0.35)])
def test_composite_reward_by_hand(k, lambda_vis):
    R, A = advantages(
        {n: torch.tensor(v, dtype=torch.float64) for n, v in SCORES.items()}, k, 4, settings(), lambda_vis
    )
    s = {n: np.array(v) for n, v in SCORES.items()}
    r_ver = 0.3 * (s["bleu4"] + s["rouge_l"]) + 0.7 * s["bertscore"] + 0.4 * s["third"]  # Eq. 3
    r_clin = 0.2 * s["chexbert"] + 0.6 * s["radgraph"] + 0.25 * s["fourth"]  # Eq. 4
    r_text = r_ver + 0.9 * r_clin * (k % 3 == 0)  # Eq. 5
    r_vis = np.array([1 / 3, 1, 0, 2 / 3])  # Eq. 7: ranks 3, 1, 4, 2
    expected = (
        (1 - lambda_vis) * r_text + lambda_vis * r_vis + 0.11 * s["format"] + 0.15 * s["eighth"]
    )  # Eq. 8
    assert R.tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert A.tolist() == pytest.approx((2 * expected.argsort().argsort() / 3 - 1).tolist())  # Eq. 9


class Recorder:
    "Stands for the trainer: keeps what it is made with."

    is_deepspeed_enabled = True  # there is no adapter to cast
    is_fsdp_enabled = False

    def __init__(self, model, rewards, cfg, lambda_vis, k_start, args, **kw):
        self.args, self.model = args, model

    def remove_callback(self, callback):
        pass

    def add_callback(self, callback):
        pass


def arguments(monkeypatch, tmp_path, **change):
    "What `make_trainer` gives TRL under unequal weights, without a policy: (arguments, rewards' names)."
    for name, stub in dict(
        load_policy=lambda *a, **kw: (None, SimpleNamespace(image_token="<image>")),
        check_references=lambda data: None,
        conversations=lambda data, **asked: data,
        asked_by=lambda processor: None,
        groups=lambda model: dict(projector=[]),
        adapters_on=lambda model, modules: [],
        lora_config=lambda *a: None,
        shard_by_layer=lambda *a: None,
        image_tokens=lambda *a: {},
        ValorTrainer=Recorder,
    ).items():
        monkeypatch.setattr(grpo, name, stub)
    cfg = settings(
        epsilon=0.13,
        temperature=0.77,
        beta=0.031,
        lr=3e-4,
        num_iterations=2,
        save_steps=5,
        group_size=4,
        batch_size=2,
        max_new_tokens=17,
        **change,
    )
    scorers = dict.fromkeys(
        [n for n in SCORES if n not in ("similarity",)], SimpleNamespace(score=lambda c, r: [0.0] * len(c))
    )
    rewards = Rewards(
        scorers, 3, similarity=lambda texts, rows: [], watch={"truth_f1": lambda texts, rows: []}
    )
    stage = Stage("language", 0.35, steps=7, seed=5)
    return make_trainer("sft", [1], tmp_path, rewards, cfg, stage).args, rewards.names


def test_configuration_reaches_trl(monkeypatch, tmp_path):
    args, _ = arguments(monkeypatch, tmp_path)
    got = {
        n: getattr(args, n)
        for n in (
            "epsilon",
            "temperature",
            "beta",
            "learning_rate",
            "num_iterations",
            "num_generations",
            "max_completion_length",
            "max_steps",
            "seed",
            "loss_type",
        )
    }
    assert got == dict(
        epsilon=0.13,
        temperature=0.77,
        beta=0.031,
        learning_rate=3e-4,
        num_iterations=2,
        num_generations=4,
        max_completion_length=17,
        max_steps=7,
        seed=5,
        loss_type="grpo",
    )
    assert args.save_steps == 6  # the next whole generation: a checkpoint amid one could not be gone on from


def test_weights_of_the_grpo_baseline(monkeypatch, tmp_path):
    "TRL adds rewards up by these: what Eq. 3 to 5 and 8 come to where nothing is ranked."
    args, names = arguments(monkeypatch, tmp_path)
    expected = dict(
        bleu4=0.3,
        rouge_l=0.3,
        bertscore=0.7,
        chexbert=0.9 * 0.2,
        radgraph=0.9 * 0.6,
        format=0.11,
        third=0.4,
        fourth=0.9 * 0.25,
        eighth=0.15,
        similarity=0,
        distinct=0,
        truth_f1=0,
    )
    assert dict(zip(names, args.reward_weights)) == pytest.approx(expected)


def test_stages_have_their_own_steps_modules_and_seeds(monkeypatch, tmp_path):
    made = []

    def stub(sft, data, out, rewards, cfg, stage, per_device):
        made.append((stage.modules, stage.steps, stage.seed))

        def none(*a, **kw):
            return None

        return SimpleNamespace(
            add_callback=none,
            train=none,
            save_model=none,
            args=SimpleNamespace(
                output_dir=tmp_path,
                max_steps=stage.steps,
                gradient_accumulation_steps=1,
                per_device_train_batch_size=8,
            ),
            state=SimpleNamespace(log_history=[dict(k=1), dict(train_loss=0)]),
        )

    monkeypatch.setattr(grpo, "make_trainer", stub)
    monkeypatch.setattr(grpo, "train_to_end", lambda *args, **kw: None)
    monkeypatch.setattr(grpo, "read_references", lambda *args: None)
    cfg = preset(
        "smoke",
        stage1_steps=3,
        stage2_steps=11,
        seed=4,
        stage1_modules="language",
        stage2_modules="language+projector",
        eval_steps=None,
        batch_size=4,
        rl_epochs=2,
    )
    for stage in (1, 2):
        assert align("sft", range(10), tmp_path, None, cfg, stage, 0.0) == [dict(k=1, stage=stage)]
    assert made == [("language", 3, 41), ("language+projector", 11, 42)]
    for iterations, updates in (
        (1, 6),
        (2, 12),
    ):  # two epochs over 10 studies, 4 a generation: 3 generations each, every one used so often
        align(
            "sft",
            range(10),
            tmp_path,
            None,
            dataclasses.replace(cfg, stage1_steps=None, num_iterations=iterations),
            1,
            0.0,
        )
        assert made[-1][1] == updates


def test_k_counts_training_generations_alone(monkeypatch):
    monkeypatch.setattr(grpo.SharedRollout, "_calculate_rewards", lambda self, *a: torch.zeros(4, 1))
    t = ValorTrainer.__new__(ValorTrainer)
    t.__dict__.update(
        model=SimpleNamespace(training=True),
        state=SimpleNamespace(stateful_callbacks={}),
        k_start=7,
        rewards=SimpleNamespace(k=0),
        _times={},
    )
    seen = []
    for training in (False, True, False, True, True, False):
        t.model.training = training
        t._calculate_rewards()
        seen.append((t.k, t.rewards.k))
    assert seen == [(7, 7), (8, 8), (8, 8), (9, 9), (10, 10), (10, 10)]


LEFT, RIGHT = (Finding("opacity", side, "lower") for side in ("left", "right"))


def test_a_finding_in_the_wrong_place_is_an_error_and_a_miss():
    nodule = Finding("nodule", "left", "upper")
    c = phantom.compare([LEFT, nodule], [RIGHT, nodule, Finding("effusion", "left")])
    assert (c["matched"], c["mislocated"], c["hallucinated"], c["missed"]) == (1, 1, 0, 1)
    assert phantom.located_f1(c) == pytest.approx(2 * 1 / (2 * 1 + 1 + 2))  # said 2, there 3
    counts = dict(matched=5, mislocated=3, hallucinated=7, missed=11, severity_ok=0)
    assert phantom.located_f1(counts) == pytest.approx(10 / (10 + 6 + 7 + 11))


def test_columns_of_planted_findings(monkeypatch):
    monkeypatch.setattr(
        ev, "compare", lambda said, truth: dict(matched=5, mislocated=3, hallucinated=7, missed=11)
    )
    row = dict(zip(ev.FINDING_COLUMNS, ev.planted_columns("", [])))
    assert row == dict(
        finding_tp=8,
        hallucinated=7,
        missed=11,
        located_tp=5,
        located_fp=10,
        located_fn=14,
        mislocated=3,
        duplicates=0,
    )


CASES = dict(
    candidate=[
        "no pneumonia .",
        "large pleural effusion .",
        "the lungs are clear .",
        "a pacemaker is seen .",
    ],
    reference=["pneumonia .", "mild cardiomegaly .", "pneumothorax .", "the lungs are clear ."],
)


def test_abnormal_recall_counts_what_is_present():
    "Three are abnormal: one report says so (of another thing), one denies it (no finding), one is silent."
    columns = ev.label_columns(CASES["candidate"], CASES["reference"], LabelF1())
    assert columns.abnormal.tolist() == [1, 1, 1, 0] and columns.abnormal_found.tolist() == [0, 1, 0, 0]
    assert columns.normal_kept.tolist() == [0, 0, 0, 1]


def test_specificity_counts_normal_studies_that_are_reported_as_normal():
    "Of two studies without a pathology in the reference, one report invents one: .5. Others do not count."
    said = ["the lungs are clear .", "large pleural effusion .", "the lungs are clear ."]
    true = ["the lungs are clear .", "the heart is normal .", "pneumothorax ."]
    sums = dict(ev.label_columns(said, true, LabelF1()).sum(), studies=3.0)
    assert ev.REGISTERED["specificity"].function(sums) == 0.5


def seeds(values, n=12, name="rouge_l"):
    return {
        s: pd.DataFrame({name: np.full(n, v)}, index=[f"s{i}" for i in range(n)])
        for s, v in enumerate(values)
    }


def test_every_bootstrap_draws_the_seeds_anew():
    "Seeds differ, studies do not: all of an interval's width comes from seeds (a draw's mean has sd .05)."
    one, other = seeds([0.2, 0.3, 0.4, 0.3]), seeds([0.31, 0.31, 0.31, 0.31])
    full = {s: f.reindex(columns=ev.STATISTICS, fill_value=0.0) for s, f in one.items()}
    tidy = tables.compare({"x": one, "VALOR": other}, ["ROUGE-L"], n=2000).set_index("system")
    mentions = {
        s: pd.DataFrame(dict(study_id=f.index, pointing=f.rouge_l.to_numpy())) for s, f in one.items()
    }
    intervals = {
        "aggregate": ev.aggregate({"x": full}, 2000).query("metric == 'ROUGE-L'")[["lo", "hi"]].iloc[0],
        "compare": tidy.loc["x", ["lo", "hi"]],
        "attention": attention.estimate(mentions, "pointing", list(one[0].index), 2000)[1:],
    }
    for name, (lo, hi) in intervals.items():
        assert 0.2 < lo < 0.26 and 0.34 < hi < 0.4, name
    shifted = {
        "difference": tidy.loc["x", ["difference_lo", "difference_hi"]],
        "paired": ev.paired_difference({"x": one, "y": other}, "x", "y", "ROUGE-L", 2000)[1:],
    }
    for name, (lo, hi) in shifted.items():
        assert -0.11 < lo < -0.05 and 0.03 < hi < 0.09, name


def test_one_bootstrap_for_valor_evaluate_and_the_tables():
    "One of eight studies is abnormal; both leave out the third of the draws that lack it (no recall)."

    def frame(found):
        return pd.DataFrame(
            dict(abnormal=[1.0] + [0.0] * 7, abnormal_found=[found] + [0.0] * 7),
            index=[f"s{i}" for i in range(8)],
        )

    frames, metrics = (
        {"VALOR": frame(1.0), "x": frame(0.0)},
        {"abnormal recall": ev.METRICS["abnormal recall"]},
    )
    a = tidy_table(frames, metrics, 1000, 0).set_index("system").loc["x"]
    b = (
        tables.compare({s: {0: f} for s, f in frames.items()}, list(metrics), n=1000)
        .set_index("system")
        .loc["x"]
    )
    assert a.p == pytest.approx(
        2 / (1 + (study_draws(8, 1000, 0)[:, 0] > 0).sum())
    )  # found in every draw that has it
    for column in ("value", "lo", "hi", "difference", "difference_lo", "difference_hi", "p", "p_holm"):
        assert a[column] == b[column], column


@pytest.mark.parametrize(
    "uncertain,expected", [("positive", (0, 1, 0)), ("negative", (0, 0, 0)), ("class", (0, 1, 0))]
)
def test_runs_and_valor_evaluate_count_uncertain_alike(uncertain, expected):
    from valor.metrics.evaluate import DEFAULTS, chexbert

    said, true = "possible pneumonia .", "no pneumonia ."
    (row,) = chexbert(DEFAULTS | dict(chexbert_uncertain=uncertain))[0]([(said, true)])
    frame = ev.label_columns([said], [true], LabelF1(uncertain=uncertain)).iloc[0]
    assert (
        frame.to_dict() == row and tuple(row[f"{kind} Pneumonia"] for kind in ("tp", "fp", "fn")) == expected
    )
    both = ev.label_columns([said, said], ["pneumonia .", said], LabelF1(uncertain=uncertain))
    got = [tuple(both[f"{kind} Pneumonia"][i] for kind in ("tp", "fp", "fn")) for i in (0, 1)]
    assert (
        got
        == dict(
            positive=[(1, 0, 0), (1, 0, 0)],
            negative=[(0, 0, 1), (0, 0, 0)],
            **{"class": [(0, 1, 1), (1, 0, 0)]},
        )[uncertain]
    )


def test_convergence_is_judged_on_ten_updates():
    log = pd.DataFrame({"k": range(1, 31), FORMAT: [1.0] * 30})
    log.loc[29, FORMAT] = 0.0  # one bad update at the end of a good run
    assert not_converged(log) == []
    log.loc[20:, FORMAT] = [0.0] * 9 + [1.0]  # one good one at the end of a bad one
    assert not_converged(log) == ["format rate 0.10 (below 0.5)"]
