"""`valor watch` reads a job from its files while it works: terminal, page, browser, what it refuses."""

import dataclasses
import gzip
import json
import re
import subprocess

import pytest
from test_gallery import needs_browser, start

from valor.cli import main
from valor.config import preset
from valor.data.restricted import PlaceError
from valor.runs import phases, plan, watch

CFG = preset("smoke", threads=1, n_train=8, n_test=2, n_val=2)
STUDY = []  # one with an abnormal label
HOSTILE = "<script>document.title='broken'</script> left effusion"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    "A runs folder with a job whose stage 1 has made two of four updates."
    runs = tmp_path_factory.mktemp("watched") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VALOR_RUNS", str(runs))
        steps = plan.steps_for([("stage1", CFG, "")])
        phases.ensure("data", CFG)
        following = plan.Job(steps, "trial")
        following.keep()
        for step in steps[1:3]:
            step.folder.mkdir()
            (step.folder / "config.json").write_text("{}")
            (step.folder / "done.json").write_text("{}")
        data = phases.load_data(steps[0].folder)["train"]
        abnormal = next(row["study_id"] for row in data if 1 in row["labels"][:12])
    STUDY.append(abnormal)
    update(steps[3].folder, (1, 2))
    return runs


def update(stage, ks):
    "Write what a stage in the folder `stage` has written after the updates `ks`."
    (stage / "completions").mkdir(parents=True, exist_ok=True)
    (stage / "checkpoints").mkdir(exist_ok=True)
    (stage / "config.json").write_text(json.dumps(dict(full=dataclasses.asdict(CFG))))
    logs, members = [], []
    for k in ks:
        parts = {"rewards/bleu4/mean": 0.1 * k, "completions/mean_length": 20.0}
        logs.append(dict(step=k, of=4, k=k, reward=0.2 * k, kl=0.01 * k) | parts)
        rows = [
            dict(k=k, group=0, candidate=i, study_id=STUDY[0], completion=text, R=0.5 - 0.1 * i)
            for i, text in enumerate((HOSTILE, "no pneumothorax ."))
        ]
        members.append(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (stage / "checkpoints" / "live.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logs))
    (stage / "completions" / "generations.jsonl.gz").write_bytes(b"".join(members))


def stage_of(runs):
    return next(runs.glob("stage1-*/config.json")).parent


def test_terminal_shows_step_curves_and_newest_reports(job, capsys):
    main(["watch", str(job), "--once"])
    said = capsys.readouterr().out
    assert re.match(r"trial: step 4 of 4, stage 1, update 2 of 4", said)
    assert re.search(r"^  reward +▁█ +0.2 → 0.4$", said, re.M) and re.search(r"^  BLEU-4 ", said, re.M)
    assert re.search(r"^  finding recall ", said, re.M)  # by the rules: nothing was planted in this log
    assert "generation 2" in said and said.index("R 0.500") < said.index("R 0.400") and "reference" in said


def test_any_name_of_a_job_finds_it(job, monkeypatch):
    monkeypatch.setenv("VALOR_RUNS", str(job))
    found = {watch.find_job(p) for p in (None, job, "trial", stage_of(job), job / "jobs" / "trial.json")}
    assert found == {job / "jobs" / "trial.json"}


@pytest.mark.parametrize(
    "words, message",
    [(["nothing-here"], "nothing-here: no job there; expected"), (["--every", "0"], "--every 0: expected")],
)
def test_what_is_wrong_is_one_line(words, message, job, monkeypatch):
    monkeypatch.setenv("VALOR_RUNS", str(job))
    with pytest.raises(SystemExit, match=message):
        main(["watch", *words])


def test_restricted_reports_are_not_written_into_a_repository(job, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    view = dataclasses.replace(watch.Watcher(job / "jobs" / "trial.json").look(), benchmark="mimic_cxr_jpg")
    with pytest.raises(PlaceError, match="lies in a repository"):
        watch.write_page(view, tmp_path / "watch.html", 5)
    assert not (tmp_path / "watch.html").exists()


def test_only_what_is_new_is_read_and_a_cut_table_is_read_again(job):
    stage, watcher = stage_of(job), watch.Watcher(job / "jobs" / "trial.json")
    assert watcher.look().k == 2
    reader = watcher.readers[stage]
    at = reader.at
    update(stage, (1, 2, 3))
    assert watcher.look().k == 3 and reader.at > at
    update(stage, (1, 2))  # resumed from a checkpoint
    assert watcher.look().k == 2


@needs_browser
def test_a_browser_shows_the_page_and_loads_it_again(job, tmp_path):
    stage, page, watcher = stage_of(job), tmp_path / "watch.html", watch.Watcher(job / "jobs" / "trial.json")
    watch.write_page(watcher.look(), page, 1)
    browser = start(tmp_path / "profile")
    try:
        browser.get(page.as_uri())
        assert browser.title.startswith("trial: step 4 of 4, stage 1, update 2 of 4")
        assert len(browser.find_elements("css selector", "svg polyline")) >= 5
        film = browser.find_element("css selector", ".study img")
        assert browser.execute_script("return arguments[0].naturalWidth", film) > 0
        assert HOSTILE in browser.find_element("css selector", "table").text
        update(stage, (1, 2, 3))
        watch.write_page(watcher.look(), page, 1)
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(browser, 20).until(lambda b: "update 3 of 4" in b.title)
        assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    finally:
        browser.quit()
        update(stage, (1, 2))
