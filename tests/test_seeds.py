"""Statistics over seeds: exact p-values, intervals of the right width, files that keep what was measured."""

import dataclasses
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from valor.config import preset
from valor.data.restricted import PlaceError
from valor.files import DataError
from valor.metrics import seeds as sd
from valor.metrics.statistics import STATISTICS, measure

MEAN = {"mean": (lambda sums: sums["x"] / sums["studies"], "↑")}


def frame(values, seed=0):
    return pd.DataFrame(dict(x=values), index=[f"{seed}-{i}" for i in range(len(values))], dtype=float)


def whole_frame(seed=0, studies=20):
    "A frame with every statistic, some of which do not apply."
    numbers = np.random.default_rng(seed).integers(0, 5, (studies, len(STATISTICS))).astype(float)
    table = pd.DataFrame(numbers, columns=STATISTICS, index=[f"00{seed}{i:02}" for i in range(studies)])
    return table.assign(rouge_l=table.rouge_l / 7, retrieved=np.nan)


# --- tests and intervals


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_sign_flips_give_the_p_of_scipys_permutation_test(seeds):
    rng = np.random.default_rng(seeds)
    for _ in range(5):
        gaps = rng.normal(0.05, 0.05, seeds)
        theirs = stats.permutation_test(
            (gaps,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        assert sd.sign_flip_test(gaps) == pytest.approx(theirs.pvalue)


def test_sign_flips_by_hand():
    # of the 8 signed sums of 1, 2, 5 (±8 ±6 ±4 ±2), 4 are at least 6 in size
    assert sd.sign_flip_test([-1, 2, 5]) == 4 / 8
    assert sd.sign_flip_test([1, 2, 5]) == 2 / 8 == sd.smallest_p(3)
    assert sd.sign_flip_test([0.3] * 8) == 2 / 256 == sd.smallest_p(8)
    assert sd.sign_flip_test([0.0] * 8) == 1 == sd.smallest_p(1)
    # tenths are not exact, and yet some of their sums are equally large
    for gaps in ([-3, -3, 1, 2], [-3, -3, -2, 7], [-3, -3, 1, 1]):
        assert sd.sign_flip_test(np.array(gaps) / 10) == sd.sign_flip_test(gaps)
    assert sd.sign_flip_test([-0.3, -0.3, 0.1, 0.2]) == 12 / 16
    for wrong in ([], [np.nan, 1], [1.0] * 17, [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="differences"):
            sd.sign_flip_test(wrong)


def test_intervals_of_the_mean_and_of_a_rerun():
    values = np.array([0.31, 0.35, 0.30, 0.42, 0.38, 0.33, 0.36, 0.39])
    s, t = values.std(ddof=1), 2.364624  # the .975 quantile with 7 degrees of freedom, from a table
    assert sd.mean_interval(values) == pytest.approx((0.355 - t * s / 8**0.5, 0.355 + t * s / 8**0.5))
    half = t * s * (9 / 8) ** 0.5
    assert sd.prediction_interval(values) == pytest.approx((0.355 - half, 0.355 + half))
    assert sd.mean_interval(values) == pytest.approx(
        stats.t.interval(0.95, 7, loc=values.mean(), scale=stats.sem(values))
    )


def test_a_rerun_lies_in_its_interval_as_often_as_promised():
    draws = np.random.default_rng(0).normal(0, 1, (4000, 6))
    lo, hi = sd.prediction_interval(draws[:, :5])
    inside = (lo <= draws[:, 5]) & (draws[:, 5] <= hi)
    assert inside.mean() == pytest.approx(0.95, abs=0.012)
    lo, hi = sd.mean_interval(draws[:, :5])
    assert ((lo <= draws[:, 5]) & (draws[:, 5] <= hi)).mean() < 0.8


def test_draws_vary_as_much_as_seeds_and_studies_do():
    rng, studies = np.random.default_rng(0), 400
    alike = rng.normal(0, 1, studies)
    zero = [frame(np.zeros(studies), s) for s in range(5)]
    # the same difference in every seed: what is left is the noise of 5 × 400 studies, each drawn by itself
    pairs = [(frame(alike, s), z) for s, z in enumerate(zero)]
    draws = sd.nested_draws(pairs, MEAN, 6000, 0)
    assert draws.std() == pytest.approx(alike.std() / (5 * studies) ** 0.5, rel=0.05)
    # studies without noise: what is left is the noise of 5 seeds
    means = np.array([0.1, 0.3, 0.2, 0.6, 0.4])
    pairs = [(frame(np.full(studies, m), s), z) for s, (m, z) in enumerate(zip(means, zero))]
    draws = sd.nested_draws(pairs, MEAN, 6000, 0)
    assert draws.std() == pytest.approx(means.std() / 5**0.5, rel=0.05)
    # both
    pairs = [(frame(alike + m, s), z) for s, (m, z) in enumerate(zip(means, zero))]
    both = (means.var() / 5 + alike.var() / (5 * studies)) ** 0.5
    assert sd.nested_draws(pairs, MEAN, 6000, 0).std() == pytest.approx(both, rel=0.05)


def test_seeds_that_share_a_test_set_share_the_drawn_studies():
    rng, studies = np.random.default_rng(0), 400
    alike, means = rng.normal(0, 1, studies), np.array([0.0, 0.02, 0.1, 0.04])
    shared = [(frame(alike + m), frame(np.zeros(studies))) for m in means]
    both = (means.var() / 4 + alike.var() / studies) ** 0.5  # the noise of studies is that of one seed
    assert sd.crossed_draws(shared, MEAN, 6000, 0).std() == pytest.approx(both, rel=0.05)
    a, b = ({s: pair[i] for s, pair in enumerate(shared)} for i in (0, 1))
    of_one = sd.hierarchical_interval(a, b, "mean", 4000, 0, MEAN)
    own = [{s: frame(f.x.to_numpy(), s) for s, f in system.items()} for system in (a, b)]
    nested = sd.hierarchical_interval(*own, "mean", 4000, 0, MEAN)
    assert of_one[0] == nested[0]
    assert of_one[2] - of_one[1] == pytest.approx(2 * 1.96 * both, rel=0.06)
    less = (means.var() / 4 + alike.var() / (4 * studies)) ** 0.5
    assert nested[2] - nested[1] == pytest.approx(2 * 1.96 * less, rel=0.06)


def test_the_interval_is_paired_over_systems_and_fixed_by_its_seed():
    rng = np.random.default_rng(0)
    b = {s: frame(rng.normal(0, 100, 30), s) for s in range(4)}
    assert sd.hierarchical_interval({s: f + 2 for s, f in b.items()}, b, "mean", 50, known=MEAN) == (
        pytest.approx((2, 2, 2))
    )
    a = {s: f + rng.normal(2, 1, (30, 1)) for s, f in b.items()}
    one, two, other = (sd.hierarchical_interval(a, b, "mean", 50, seed, MEAN) for seed in (0, 0, 1))
    assert one == two and one[0] == other[0] and one != other
    with pytest.raises(ValueError, match="seed 0: the two systems were not measured on the same studies"):
        sd.hierarchical_interval(a, {0: b[1]}, "mean", 50, known=MEAN)
    assert np.isnan(sd.hierarchical_interval(a, {}, "mean", 50, known=MEAN)).all()


def test_the_simulated_interval_is_the_one_of_frames():
    rng, studies = np.random.default_rng(2), 500
    pairs = [
        (frame(rng.normal(m, 0.5, studies), s), frame(np.zeros(studies), s)) for s, m in enumerate((0, 1, 3))
    ]
    lo, hi = np.percentile(sd.nested_draws(pairs, MEAN, 8000, 0), [2.5, 97.5])
    observed = np.array([[a.x.mean() for a, _ in pairs]])
    made = sd.made_up_intervals(observed, 0.5 / studies**0.5, rng, n_boot=8000)["seeds and studies"]
    assert [float(x[0]) for x in made] == pytest.approx([lo, hi], abs=0.05)


def test_simulated_experiments_give_what_theory_says():
    noise = sd.Noise(between=0.05, within=0.5, studies=300)
    assert noise.error == pytest.approx(0.5 / 300**0.5)
    nothing, some, four = (sd.simulate(e, n, noise) for e, n in ((0.0, 8), (0.1, 8), (0.1, 4)))
    assert nothing["found"] == pytest.approx(12 / 256, abs=0.015)  # p ≤ .05 is at most 12 of 256 choices
    assert some["found"] > 0.95 and four["found"] == 0
    sd_of_mean = (noise.between**2 + noise.error**2) ** 0.5
    alone = 2 * stats.norm.cdf(1.96 * noise.error / sd_of_mean) - 1
    assert nothing["covers: studies alone"] == pytest.approx(alone, abs=0.03)
    assert nothing["covers: Student's t"] == pytest.approx(0.95, abs=0.02)
    assert 0.91 < nothing["covers: seeds and studies"] < 0.97


# --- tables


def counted(right, wrong, seed, studies=30):
    columns = dict(located_tp=right, located_fp=wrong, located_fn=2 - right, hallucinated=wrong)
    return pd.DataFrame(columns, index=[f"{seed}-{i}" for i in range(studies)], dtype=float)


def test_contrasts_by_hand():
    # VALOR: F1 = 2·1 / (2·1 + wrong + 1), .5 invented a report; placebo: F1 of nothing, nothing invented
    frames = {
        "VALOR": {s: counted(1.0, 0.5, s) for s in range(8)},
        "VALOR, placebo": {s: counted(0.0, 0.0, s) for s in range(8)},
        "VALOR w/o visual": {s: counted(1.0, 0.5 if s else 0.2, s) for s in range(5)},
    }
    table = sd.contrast_table(frames, n_boot=50).set_index(["family", "a", "b", "metric"])
    found = table.loc[("primary", "VALOR", "VALOR, placebo", "located F1")]
    assert found.difference == pytest.approx(2 / 3.5) and found.seeds == 8
    assert found[["p", "smallest_p"]].tolist() == [2 / 256] * 2 and found.p_holm == 4 / 256
    assert found[[f"seed {s}" for s in range(8)]].tolist() == pytest.approx([2 / 3.5] * 8)
    second = table.loc[("secondary", "VALOR", "VALOR w/o visual", "hallucinated")]
    gaps = np.array([0.3, 0, 0, 0, 0])
    assert second.seeds == 5 and second.difference == pytest.approx(0.06) and second.p == 1
    assert second[["rerun_lo", "rerun_hi"]].tolist() == pytest.approx(sd.prediction_interval(gaps))
    assert second[["t_lo", "t_hi"]].tolist() == pytest.approx(sd.mean_interval(gaps))
    missing = table.loc[("secondary", "VALOR", "SFT", "BLEU-4")]
    assert missing.seeds == 0 and missing[["difference", "lo", "p", "p_holm"]].isna().all()
    assert table.index.get_level_values("family").tolist() == ["primary"] * 2 + ["secondary"] * 5


def test_holm_runs_over_each_family_by_itself():
    def of(gap):
        return {s: frame(np.full(4, g), s) for s, g in enumerate(gap)}

    frames = {"zero": of([0] * 8), "one": of([1.0] * 8), "two": of([1, 1, 1, 1, 1, 1, 1, -1.0])}
    plan = [sd.Contrast("first", a, "zero", "mean") for a in ("one", "two")]
    plan.append(sd.Contrast("second", "two", "zero", "mean"))
    table = sd.contrast_table(frames, plan, n_boot=50, known=MEAN)
    few, many = 2 / 256, 18 / 256  # ±6 and more: all signs alike, or one of the eight other
    assert table.p.tolist() == [few, many, many]
    assert table.p_holm.tolist() == [2 * few, many, many]


def test_values_and_their_table():
    frames = {"a": {0: frame([1, 3]), 1: frame([2, 4])}, "b": {0: frame([5, 7])}}
    values = sd.seed_values(frames, ["mean"], MEAN)
    assert values.values.tolist() == [["a", 0, "mean", 2.0], ["a", 1, "mean", 3.0], ["b", 0, "mean", 6.0]]
    table = sd.seed_table(values).set_index("system")
    assert table["mean"].tolist() == [2.5, 6.0] and table.seeds.tolist() == [2, 1]
    assert table.hi["a"] == pytest.approx(2.5 + 12.7062 * 0.5) and np.isnan(table.hi["b"])
    with pytest.raises(ValueError, match="'F1' is unknown; expected some of mean"):
        sd.seed_values(frames, ["F1"], MEAN)


def test_every_seed_is_a_dot():
    values = pd.DataFrame(
        [
            dict(system=system, seed=s, metric=metric, value=0.1 * s + (system == "VALOR"))
            for system in ("SFT", "VALOR")
            for metric in ("located F1", "hallucinated", "R@1 of 8")
            for s in range(4)
        ]
    )
    values.loc[values.metric == "R@1 of 8", "value"] = np.nan
    fig = sd.plot_seeds(values, zero=True)
    try:
        assert len(fig.axes) == 2  # what does not apply has no panel
        dots = [line.get_xdata() for line in fig.axes[0].lines if line.get_marker() == "o"]
        assert np.concatenate(dots) == pytest.approx([0, 0.1, 0.2, 0.3, 1, 1.1, 1.2, 1.3])
        assert all(line.get_ls() == "None" for line in fig.axes[0].lines if line.get_marker() == "o")
        assert fig.axes[1].get_xlabel() == "invented findings a report\nlower is better"
        assert fig.axes[0].get_xlim()[0] == 0
        assert len(fig.legends[0].get_texts()) == 4
    finally:
        plt.close(fig)


# --- files


def test_what_is_written_is_read_to_the_last_bit(tmp_path):
    frames = {system: {s: whole_frame(s) for s in (2, 10)} for system in ("SFT", "VALOR, placebo")}
    for s in (10, 2):
        of_one = {system: by_seed[s] for system, by_seed in frames.items()}
        cfg = preset("smoke", seed=s, threads=1 + (s == 2))
        first = [p.read_bytes() for p in sd.write_seed(of_one, cfg, out=tmp_path)]
        assert [p.read_bytes() for p in sd.write_seed(of_one, cfg, out=tmp_path)] == first
    sd.write_seed({"SFT": whole_frame(3)}, preset("smoke", seed=2), name="phantom_all", out=tmp_path)
    again = sd.read_seeds("phantom", tmp_path)
    assert {system: list(by_seed) for system, by_seed in again.items()} == dict.fromkeys(frames, [2, 10])
    for system, by_seed in frames.items():
        for s, one in by_seed.items():
            pd.testing.assert_frame_equal(
                again[system][s], one, check_exact=True, check_names=False, check_index_type=False
            )
            assert measure(again[system][s])["ROUGE-L"] == measure(one)["ROUGE-L"]


def test_the_sidecar_says_what_made_it_and_names_no_folder(tmp_path):
    cfg = dataclasses.replace(preset("smoke", seed=4, threads=1), base=str(tmp_path / "llava"))
    about = sd.write_seed({"SFT": whole_frame()}, cfg, note="made up", out=tmp_path)[0]
    told = json.loads(about.read_text())
    assert about.name == "phantom_seed4.json" and told["settings"]["seed"] == 4
    assert told["settings"]["base"] == "llava" and str(tmp_path) not in about.read_text()
    assert told["settings"]["threads"] == 1 and told["systems"] == {"SFT": 20}
    assert {"torch", "numpy", "python"} <= told["versions"].keys()
    assert {"threads", "cpu"} == told["drawn_on"].keys() and "computed_on" in told and "commit" in told


def test_a_write_that_is_stopped_leaves_no_half(tmp_path, monkeypatch):
    cfg = preset("smoke", seed=0)
    whole, times = sd.whole, []

    def stopped(path):
        times.append(path)
        if len(times) == 2:
            raise KeyboardInterrupt
        return whole(path)

    monkeypatch.setattr(sd, "whole", stopped)
    with pytest.raises(KeyboardInterrupt):
        sd.write_seed({"SFT": whole_frame(0)}, cfg, out=tmp_path)
    with pytest.raises(DataError, match="no file phantom_seed"):  # half a seed is none
        sd.read_seeds("phantom", tmp_path)
    monkeypatch.undo()
    sd.write_seed({"SFT": whole_frame(0)}, cfg, out=tmp_path)
    times.clear()
    monkeypatch.setattr(sd, "whole", stopped)
    with pytest.raises(KeyboardInterrupt):
        sd.write_seed({"SFT": whole_frame(1)}, cfg, out=tmp_path)
    with pytest.raises(DataError, match="not the table that phantom_seed0.json describes"):
        sd.read_seeds("phantom", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["phantom_seed0.csv.gz", "phantom_seed0.json"]


def test_what_must_not_be_kept_is_refused(tmp_path):
    cfg = preset("smoke")
    text = whole_frame().assign(report="No acute disease.")
    with pytest.raises(ValueError, match="SFT: column 'report' holds no numbers"):
        sd.write_seed({"SFT": text}, cfg, out=tmp_path)
    with pytest.raises(ValueError, match="frames: there are none"):
        sd.write_seed({}, cfg, out=tmp_path)
    with pytest.raises(ValueError, match="name="):
        sd.write_seed({"SFT": whole_frame()}, cfg, name="../phantom", out=tmp_path)
    (tmp_path / "repository/.git").mkdir(parents=True)
    restricted = dataclasses.replace(cfg, benchmark="mimic_cxr_jpg")
    with pytest.raises(PlaceError):
        sd.write_seed({"SFT": whole_frame()}, restricted, out=tmp_path / "repository/seeds")
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]
    assert not (tmp_path / "repository/seeds").exists()


def test_only_the_seed_may_differ(tmp_path):
    for s, omit in ((0, 0.4), (1, 0.0)):
        cfg = preset("smoke", seed=s, omit=omit)
        sd.write_seed({"SFT": whole_frame(s)}, cfg, out=tmp_path)
    with pytest.raises(DataError, match="seed1.csv.gz: omit=0.0, but phantom_seed0.csv.gz has 0.4"):
        sd.read_seeds("phantom", tmp_path)
    (tmp_path / "phantom_seed1.json").unlink()
    with pytest.raises(DataError, match="write this seed again"):
        sd.read_seeds("phantom", tmp_path)
