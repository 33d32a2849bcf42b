"""Two readers mark sentences in a real browser, save a file each, and `valor agreement` compares them."""

import json
import time
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score
from test_gallery import HOSTILE, needs_browser, ready, start

from valor.cli import main
from valor.data.restricted import PlaceError
from valor.results import annotate as an
from valor.testing import made_up_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    hostile = {("SFT", i): text for i, text in enumerate(HOSTILE)} | {("base", 5): ""}
    return made_up_runs(tmp_path_factory.mktemp("runs"), n=12, reports=hostile)


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "marking.html"
    named = [f"{name}={folder}" for name, folder in runs.items()]
    main(["gallery", *named[:3], "--first", "8", "--annotate", "--out", str(out)])
    return out


def key_of(page):
    return json.loads(an.key_path(page).read_text())


def shown_in(page):
    return json.loads(page.read_text().split('type="application/json">')[1].split("</script>")[0])


def test_the_page_does_not_say_who_wrote_what_and_the_key_does(page, runs):
    data, key = shown_in(page), key_of(page)
    assert len(data["studies"]) == 8 and data["page"] == key["page"]
    names = list(runs)[:3]
    assert key["systems"] == names and all(sorted(o) == sorted(names) for o in key["orders"].values())
    assert len({tuple(order) for order in key["orders"].values()}) > 1
    assert not any(f'"{name}"' in page.read_text() for name in names)
    for study in data["studies"]:
        assert [len(r) for r in study["reports"]] == key["sentences"][study["id"]]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    driver = start(folder)
    driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", dict(behavior="allow", downloadPath=str(folder / "saved"))
    )
    driver.saved = folder / "saved"
    yield driver
    driver.quit()


def click(browser, css, n=0):
    browser.execute_script("document.querySelectorAll(arguments[0])[arguments[1]].click()", css, n)


def read(browser, name, choose, studies):
    "Mark every sentence of `studies` studies as `choose(number)` says, under `name`, and save; the file."
    box = browser.find_element("id", "reader")
    box.clear()
    box.send_keys(name + "\t")
    browser.execute_script("go(0)")
    for _ in range(studies):
        for i in range(len(browser.find_elements("css selector", ".sentence"))):
            sentence = "document.querySelectorAll('.sentence')[arguments[0]]"
            browser.execute_script(f"{sentence}.querySelector('.' + arguments[1]).click()", i, choose(i))
        click(browser, "#after")
    click(browser, "#save")
    path, end = browser.saved / f"marks-{name}.json", time.time() + 20
    while not path.exists():
        assert time.time() < end, "no file was saved"
        time.sleep(0.05)
    return path


@needs_browser
def test_two_readers_mark_save_and_are_compared(browser, page, capsys):
    ready(browser, page)
    click(browser, "#save")
    assert "Say who reads first" in browser.find_element("id", "said").text
    one = read(browser, "Ann", lambda i: "right" if i % 2 else "major", 3)
    other = read(browser, "Bob", lambda i: "right" if i % 3 else "minor", 3)
    key = key_of(page)
    ann, bob = (an.read_marks(path, key) for path in (one, other))
    assert (ann[0], bob[0]) == ("Ann", "Bob") and ann[1].keys() == bob[1].keys() and len(ann[1]) > 10
    assert set(ann[1].values()) == {"right", "major"} and set(bob[1].values()) == {"right", "minor"}
    main(["agreement", str(an.key_path(page)), str(one), str(other)])
    shown = capsys.readouterr().out
    places = list(ann[1])
    expected = cohen_kappa_score([ann[1][p] for p in places], [bob[1][p] for p in places])
    assert f"{expected:.3f}" in shown and "Ann and Bob" in shown and "SFT" in shown
    logs = browser.get_log("browser")
    assert not [entry for entry in logs if entry["level"] == "SEVERE"], logs


@needs_browser
def test_marks_survive_a_reload_and_a_missing_finding_is_kept(browser, page):
    ready(browser, page)
    box = browser.find_element("id", "reader")
    box.send_keys("Cas\t")
    field = browser.find_element("css selector", ".missing input")
    field.send_keys("<b>nodule</b>\n")
    click(browser, ".marks .minor")
    ready(browser, page)
    assert browser.execute_script("return Object.keys(state.marks).length") == 0  # nobody has said who reads
    browser.find_element("id", "reader").send_keys("Cas\t")
    assert browser.execute_script("return Object.values(state.marks)") == ["minor"]
    assert "missing (minor): <b>nodule</b>" in browser.find_element("css selector", "#reports ul").text
    browser.find_element("id", "reader").clear()
    browser.find_element("id", "reader").send_keys("Dee\t")  # another reader begins anew
    assert browser.execute_script("return Object.keys(state.marks).length") == 0


@needs_browser
def test_hostile_reports_are_text_and_nothing_is_requested(browser, page):
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser did by itself before
    ready(browser, page)
    assert browser.title != "broken"
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(("file:", "data:", "about:")) for url in urls), urls
    said = browser.execute_script("return DATA.studies.flatMap(s => s.reports.flat()).join(' ')")
    assert "<script>" in said


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(page="other"), "marks of another page"),
        (dict(marks={"nobody/0/0": "right"}), "no such sentence"),
        (dict(marks=None), "valor agreement"),
        (None, "no 'marks' in it; expected marks that the page saved"),
    ],
)
def test_marks_that_do_not_fit_are_one_line(page, tmp_path, change, says):
    good = dict(page=key_of(page)["page"], reader="Ann", marks={}, missing={})
    wrong = dict(page=good["page"]) if change is None else good | change
    (tmp_path / "marks.json").write_text(json.dumps(wrong))
    with pytest.raises(SystemExit, match=says) as end:
        main(["agreement", str(an.key_path(page)), str(tmp_path / "marks.json")])
    assert "\n" not in str(end.value)


def test_a_missing_file_and_maps_on_a_marking_page_are_one_line(page, runs, tmp_path):
    with pytest.raises(SystemExit, match="no such file"):
        main(["agreement", str(tmp_path / "no.key.json"), "x.json"])
    run = str(next(iter(runs.values())))
    with pytest.raises(SystemExit, match="leave one of the two out"):
        main(["gallery", run, "--annotate", "--attention", "a=b", "--out", str(tmp_path / "a.html")])
    assert not list(tmp_path.glob("*.html"))


def test_restricted_studies_stay_outside_repositories(page, runs, tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()

    def refuse(benchmark, out):
        raise PlaceError(f"{out}: lies in a repository")

    monkeypatch.setattr(an, "check_page_place", refuse)
    with pytest.raises(PlaceError, match="lies in a repository"):
        an.annotate([str(next(iter(runs.values())))], tmp_path / "a.html")
    assert not (Path(tmp_path) / "a.html").exists()
