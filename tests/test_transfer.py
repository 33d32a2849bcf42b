"""`valor evaluate-on`: a trained policy on another data set's test studies."""

import json

import pandas as pd
import pytest
from test_ways_out import mine

from valor.cli import main
from valor.config import preset
from valor.data.restricted import PlaceError
from valor.runs import transfer
from valor.runs.makers import read_frame, read_reports
from valor.runs.phases import ensure, load_data, phase_folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder of runs in which SFT of the preset smoke is trained."
    folder = tmp_path_factory.mktemp("transfer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VALOR_RUNS", str(folder / "runs"))
        ensure("eval_sft", preset("smoke"))
        yield folder


def test_the_command_shows_both_rows_and_keeps_what_it_wrote(runs, capsys):
    arguments = ["evaluate-on", "openi_rendered", "--preset", "smoke", "--systems", "SFT", "--n-test", "10"]
    main(arguments)
    shown = capsys.readouterr().out
    assert "located F1" not in shown
    for row in ("SFT", "best fixed report", "random report", "retrieval by expert"):
        assert f"{row}, phantom" in shown and f"{row}, openi_rendered" in shown
    table = pd.read_csv(next((runs / "runs/results").rglob("transfer_phantom_to_openi_rendered_n*_sft.csv")))
    assert dict(table.groupby("data").studies.first()) == {"openi_rendered": 10, "phantom": 16}
    home = table[(table.data == "phantom") & (table.system == "SFT")]
    assert (home.kept.dropna() == 1).all() and "finding F1" in set(home.metric)
    own = read_frame(phase_folder("eval_sft", preset("smoke")), "test")
    assert home.set_index("metric").value["words"] == pytest.approx(own.words.mean(), rel=1e-4)
    written = next((runs / "runs").glob("transfer_sft-*/done.json"))
    before = written.stat().st_mtime_ns
    main(arguments)
    assert written.stat().st_mtime_ns == before
    studies = json.loads(next((runs / "runs/results").rglob("transfer_phantom_*.json")).read_text())
    assert studies["benchmarks"] == ["openi_rendered", "phantom"]


def test_the_policy_sees_the_other_images_and_is_scored_with_their_reports(runs):
    cfg = preset("smoke")
    target = transfer.target_of(cfg, "openi_rendered", n_test=10)
    folder = transfer.transferred("SFT", cfg, target)
    test = load_data(phase_folder("data", target))["test"]
    frame, written = read_frame(folder, "test"), read_reports(folder, "test")
    assert list(frame.index) == list(test["study_id"]) and len(written) == 10
    assert test[0]["image"].size == (cfg.image_size, cfg.image_size)
    assert frame.located_tp.isna().all() and frame.finding_tp.notna().all()


def test_an_interrupted_transfer_goes_on(runs, monkeypatch):
    cfg = preset("smoke")
    target = transfer.target_of(cfg, "openi_rendered", n_test=9)
    monkeypatch.setattr(transfer.ev, "score_reports", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        transfer.transferred("SFT", cfg, target)
    monkeypatch.undo()
    monkeypatch.setenv("VALOR_RUNS", str(runs / "runs"))
    assert (transfer.transferred("SFT", cfg, target) / "done.json").exists()


def test_restricted_studies_stay_outside_repositories_and_closed(runs, tmp_path, monkeypatch):
    table = mine(tmp_path)
    cfg = preset("smoke")
    target = transfer.target_of(cfg, "table", table.data_root, table.data_options)
    folder = transfer.transferred("SFT", cfg, target)
    assert folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    (tmp_path / "clone/.git").mkdir(parents=True)
    (tmp_path / "clone/runs").symlink_to(runs / "runs")
    (runs / ".git").mkdir()
    try:
        with pytest.raises(PlaceError, match="set VALOR_RUNS"):
            transfer.transferred(
                "SFT", cfg, transfer.target_of(cfg, "table", table.data_root, {"view": "none"})
            )
    finally:
        (runs / ".git").rmdir()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["phantom"], "the run was trained on it"),
        (["chexpert"], "benchmark='chexpert'"),
        (["openi"], "data_root"),
        (["openi_rendered", "--systems", "PPO"], "'PPO' is unknown"),
        (["openi_rendered", "--options", "view"], "expected a JSON object"),
        (["openi_rendered", "--n-test", "0"], "n_test"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(arguments, says, tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    with pytest.raises(SystemExit, match=says) as end:
        main(["evaluate-on", *arguments, "--preset", "smoke"])
    assert "\n" not in str(end.value) and not (tmp_path / "runs").exists()
