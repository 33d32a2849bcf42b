"""The main table: paired tests that hold their level and find what is there, and a reason for every cell
without a number."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from valor.config import preset
from valor.data import phantom
from valor.metrics import statistics as ev
from valor.metrics.bootstrap import holm, p_value
from valor.metrics.evaluate import MEASURES
from valor.metrics.seeds import axis_label
from valor.results import tables
from valor.results.paper import TABLE1, beside, with_footnotes
from valor.results.tables import compare, gauges_for, main_table, options_of, rows_of, wide
from valor.runs.systems import SYSTEMS

FIGURES = Path(__file__).resolve().parents[1] / "figures"


def frame(values):
    return pd.DataFrame(dict(rouge_l=values), index=[f"s{i}" for i in range(len(values))])


def test_under_the_null_p_is_seldom_small_and_an_effect_is_found():
    rng, ps = np.random.default_rng(0), []
    for _ in range(100):
        a, b = rng.normal(0.3, 0.1, (2, 40))
        ps.append(compare({"x": {0: frame(a)}, "VALOR": {0: frame(b)}}, ["ROUGE-L"], n=400).p.iloc[0])
    assert np.mean(np.array(ps) < 0.05) < 0.12 and 0.3 < np.mean(ps) < 0.7  # its level is about what it says
    base = rng.normal(0.3, 0.1, 40)
    seeds = {s: frame(base + rng.normal(0, 0.01, 40)) for s in range(4)}
    tidy = compare(
        {
            "worse": {s: frame(f.rouge_l - 0.02) for s, f in seeds.items()},
            "control": {0: frame(base - 0.05)},
            "VALOR": seeds,
        },
        ["ROUGE-L"],
        n=2000,
    ).set_index("system")
    assert (
        tidy.difference["worse"] == pytest.approx(-0.02)
        and tidy.p_holm["worse"] < 0.01
        and tidy.p_holm["control"] < 0.01
        and np.isnan(tidy.p["VALOR"])
    )
    assert tidy.difference_lo["worse"] <= -0.02 <= tidy.difference_hi["worse"]


def test_p_values_and_their_correction_by_hand():
    assert p_value(np.array([1.0] * 99)) == pytest.approx(2 / 100)
    assert p_value(np.array([1.0] * 90 + [-1.0] * 9)) == pytest.approx(2 * 10 / 100)
    assert p_value(np.zeros(50)) == 1 and np.isnan(p_value(np.array([np.nan])))
    assert holm([0.01, 0.04, 0.03, np.nan]).tolist()[:3] == pytest.approx([0.03, 0.06, 0.06])


def test_one_registration_brings_a_metric_into_all_tables(monkeypatch):
    monkeypatch.setattr(ev, "REGISTERED", dict(ev.REGISTERED))
    test = phantom.make_phantom(12, 0, "test", size=64)
    frames = {"VALOR": {0: ev.score_reports(list(test["report"]), test, "phantom")}}
    assert "double" not in set(ev.aggregate(frames, 50).metric)
    twice = ev.Metric("double", lambda s: 2 * s["words"] / s["studies"], words="twice", gauge="chexbert")
    ev.register_metric(twice)
    assert ev.measure(frames["VALOR"][0])["double"] == 2 * ev.measure(frames["VALOR"][0])["words"]
    tidy = ev.aggregate(frames, 50)
    assert "double" in set(tidy.metric) and "twice" in ev.result_table(tidy)
    assert "double" in tables.shown_metrics("phantom") and "double" in MEASURES["chexbert"]
    assert list(wide(compare(frames, ["double"], n=50)).index) == ["twice"]
    assert len(ev.plot_results(tidy, ["double"]).axes) == 1
    assert axis_label("double") == "twice"
    ev.register_metric(dataclasses.replace(twice, axis="twice as many words"))
    assert axis_label("double") == "twice as many words" and ev.heading("double") == "twice"


def test_rows_are_compared_on_the_seeds_that_both_have():
    low, high = frame(np.full(5, 0.2)), frame(np.full(5, 0.4))
    tidy = compare({"x": {0: low, 1: low}, "VALOR": {0: low, 1: low, 2: high}}, ["ROUGE-L"], n=50).set_index(
        "system"
    )
    assert (
        tidy.value["VALOR"] == pytest.approx(0.8 / 3)
        and tidy.difference["x"] == pytest.approx(0)
        and tidy.seeds["x"] == 2
    )


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_RUNS", str(tmp_path))
    return preset("smoke")


def test_missing_runs_unknown_systems_and_metrics_are_named(cfg, tmp_path):
    rows, why = rows_of([cfg], ["VALOR", "PPO"], missing="skip")
    assert (
        rows == {}
        and "no run eval_stage2-" in why["VALOR"]
        and "'PPO' is unknown; expected some of base, SFT, DPO" in why["PPO"]
    )
    assert not list(tmp_path.iterdir())  # nothing was trained
    _, why = gauges_for(["BLEU-9", "GREEN", "RaTEScore", "BLEU-4"], options_of(cfg, {}))
    assert (
        set(why) == {"BLEU-9", "GREEN", "RaTEScore"}
        and "green=FOLDER" in why["GREEN"]
        and "unknown metric" in why["BLEU-9"]
    )
    with pytest.raises(ValueError, match="missing='no'"):
        tables.finished("eval_base", cfg, "no")
    with pytest.raises(ValueError, match="models: 'gren' is unknown"):
        options_of(cfg, {"gren": "x"})


def test_the_rest_of_the_table_still_comes(cfg, tmp_path, monkeypatch):
    train, test = phantom.make_phantom(20, 0, "train", size=64), phantom.make_phantom(12, 0, "test", size=64)
    rows, known = {}, train["report"][:] + test["report"][:2]  # two test reports and more stand in train
    for system, written in {"SFT": ev.random_reports(train, 12), "VALOR": ev.perfect_findings(test)}.items():
        folder = tmp_path / f"eval_{system}"
        folder.mkdir()
        pd.DataFrame(dict(study_id=test["study_id"], completion=written)).to_csv(
            folder / "reports test.csv", index=False
        )
        ev.score_reports(written, test, "phantom", [r in known for r in test["report"]]).to_csv(
            folder / "frame test.csv"
        )
        rows[system] = {0: (folder, "test")}
    monkeypatch.setattr(tables, "rows_of", lambda *a: (rows, {"DPO": "seed 0 has no run eval_dpo-1"}))
    monkeypatch.setattr(tables, "load_data", lambda folder: dict(test=dict(report=test["report"])))
    tidy, parts, why, runs = main_table(
        [cfg], ["SFT", "DPO", "VALOR"], ["BLEU-4", "located F1", "GREEN", "BLEU-9", "CIDEr"], n=1000
    )
    assert set(tidy.metric) == {"BLEU-4", "located F1", "CIDEr"} and len(runs) == 2
    leaked = [i for i, r in enumerate(test["report"]) if r in known]
    assert 2 <= len(leaked) < 11 and {n: set(p.studies) for n, p in parts.items()} == {
        "leaked": {len(leaked)},
        "unleaked": {12 - len(leaked)},
    }
    alone = ev.measure(
        pd.read_csv(rows["SFT"][0][0] / "frame test.csv", index_col=0).iloc[leaked],
        None,
        {"BLEU-4": ev.METRICS["BLEU-4"]},
    )
    assert parts["leaked"].set_index(["system", "metric"]).value["SFT", "BLEU-4"] == pytest.approx(
        alone["BLEU-4"]
    )
    assert tidy.set_index(["system", "metric"]).p_holm["SFT", "located F1"] < 0.05
    table = wide(tidy, ["SFT", "DPO", "VALOR"], why)
    assert (
        list(table) == ["SFT", "DPO", "VALOR"]
        and set(table["DPO"]) == {"not run"}
        and set(table.loc["GREEN ↑"]) == {"not run"}
        and table.loc["located F1 ↑", "SFT"].endswith("*")
    )
    side, notes = beside(
        TABLE1.loc["IU X-Ray"],
        tidy,
        "phantom",
        command=dict.fromkeys(tables.ROWS, tables.command_for([cfg])),
        missing=why,
    )
    text = with_footnotes(side, notes)
    assert (
        "DPO: not run: seed 0 has no run eval_dpo-1; `papermill nbs/09_main_results.ipynb out.ipynb -y "
        "'{preset: smoke, seeds: [0], benchmark: phantom}'` runs it" in text
    )
    assert "GREEN: not run; wants" in text and "27.03" in text


def test_each_committed_table_has_the_controls_of_the_reward():
    "SFT and a placebo in the expert's place beside VALOR; the page of one erased lesion has every system."
    of_the_paper = ["table1_phantom", "table1_openi_rendered", "table1_r2gen_iu", "table2_phantom"]
    for name in [*of_the_paper, "ablation_phantom", "attention_phantom_scores"]:
        assert {"SFT", "VALOR, placebo"} <= set(pd.read_csv(FIGURES / f"{name}.csv").system), name
    assert set(pd.read_csv(FIGURES / "one_lesion_phantom.csv").system) == set(SYSTEMS)
