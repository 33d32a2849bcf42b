"""Every place of the package that writes a file or opens a connection, and what it may carry. A new one
has to be named here; where it may carry restricted studies, `valor.data.restricted` guards it."""

import ast
import json
import os
from pathlib import Path

import pandas as pd
import pytest

import valor
from valor import figures
from valor.config import preset
from valor.data import report as data_report
from valor.data.restricted import PlaceError
from valor.runs import phases

WRITERS = {
    "to_csv",
    "to_json",
    "to_parquet",
    "write_text",
    "write_bytes",
    "save",
    "savefig",
    "save_to_disk",
    "save_pretrained",
    "save_file",
    "dump",
    "ArrowWriter",
    "copytree",
}
SENDERS = {
    "post",
    "urlopen",
    "OpenAI",
    "Session",
    "Client",
    "DefaultHttpxClient",
    "create_connection",
    "ThreadingHTTPServer",
    "push_to_hub",
    "upload_folder",
    "VLLMClient",
}
IN_RUN = "inside ensure, which opens the guard for the phase's folder"
IN_INDEX = "inside load_studies, which opens the guard for the index"
WEIGHTS, MADE_UP, MEMORY = (
    "a model's weights and settings",
    "made up, for tests and examples",
    "bytes in memory",
)
NUMBERS = "numbers under digests of texts, names of files"
WAYS_OUT = {
    "results.attention.write_maps": "guarded: guarded_output",
    "data.report.run_report": "guarded: guarded_output",
    "metrics.seeds.write_seed": "guarded: guarded_output",
    "metrics.seeds._write_whole": "inside write_seed, which opens the guard",
    "figures.save_page": "guarded: _guarded",
    "figures._saved": "inside save, which opens the guard",
    "results.gallery.gallery": "guarded: guarded_output",
    "runs.watch.write_page": "guarded: guarded_output",
    "train.sft.LiveLog": IN_RUN,
    "runs.card.write_card": "settings and measures, beside weights",
    "runs.card.run_push": "after check_push, which refuses what restricted data taught",
    "results.annotate.annotate": "guarded: guarded_output",
    "policy.generate.write_reports": "closed to others; whose films they are nobody has said, which valor "
    "generate says where it writes into a repository",
    "policy.generate.begin_or_go_on": "settings alone, for write_reports",
    "policy.generate._leave_out": "in begin_or_go_on, for write_reports",
    "data.studies._opened": IN_INDEX,
    "data.studies._SplitFiles": IN_INDEX,
    "data.studies._Table": IN_INDEX,
    "data.studies.write_index": IN_INDEX,
    "data.studies._store_shard": IN_RUN,
    "data.studies._write_rows": IN_RUN,
    "data.views.KnownViews": IN_INDEX,
    "results.zeroshot.collect": "inside ask and run_row, which open the guard",
    "results.zeroshot.client_of": "asked by ask alone, after check_endpoint",
    "results.zeroshot.http_client_of": "follows nothing",
    **{
        f"runs.{f}": IN_RUN
        for f in (
            "phases.write_json",
            "makers.make_data",
            "makers.real_data",
            "makers.make_sft",
            "makers.make_stage",
            "makers.make_preference",
            "makers.make_evaluation",
            "makers.make_controls",
            "makers.make_progress",
            "makers.measure_snapshot",
            "makers.save_reports",
            "trust.make_trust",
        )
    },
    "runs.systems.Results": "through figures.save",
    "runs.transfer.transfer_job": "through figures.save",
    "runs.transfer.write_transfer": "inside transferred, which opens the guard",
    "train.grpo.CompletionTable": IN_RUN,
    "policy.checkpoints.save_checkpoint": WEIGHTS,
    "policy.checkpoints.seal": NUMBERS,
    "files.locked": "an empty file, the lock",
    "files.own_lines": "cuts a torn line off what this program wrote",
    "train.preference.whole_lines": IN_RUN,
    "train.preference.sample_reports": IN_RUN,
    **{f"metrics.evaluate.{f}": NUMBERS for f in ("kept_scores", "gauged", "_write_tables")},
    "rewards.text._open": IN_RUN,
    "contents._connected": NUMBERS,
    "data.sources.read_mimic": "a scratch folder of its own, which is 0700 and goes",
    "data.images.to_png": MEMORY,
    "data.images.as_url": MEMORY,
    **{
        name: WEIGHTS
        for name in (
            "policy.convert.write_shard",
            "policy.convert.write_weights",
            "policy.convert._write_all",
            "rewards.radgraph._lay_out",
            "expert.embedded.save_expert",
            "expert.frozen.overlay",
            "expert.frozen.train_classifier",
            "policy.models.save_policy",
            "policy.generate.for_older_readers",
        )
    },
    **{
        name: MADE_UP
        for name in (
            "testing.miniature_llava_med",
            "testing.miniature_radgraph",
            "testing.miniature_biomedclip",
            "testing.made_up_runs",
            "testing._made_up_phase",
            "testing._write_encoder",
            "testing._write_original",
            "testing._write_vocabulary",
            "testing.miniature_chexbert",
            "testing.miniature_policy",
        )
    },
}


def is_way_out(call):
    f = call.func
    name = f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "")
    if name == "connect":
        return isinstance(f.value, ast.Name) and f.value.id == "sqlite3"
    if name != "open":
        return name in WRITERS | SENDERS
    modes = [
        a.value
        for a in [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
        if isinstance(a, ast.Constant) and isinstance(a.value, str)
    ]
    return any(len(m) < 4 and set(m) & set("wax+") for m in modes)


def ways_out(source, module):
    "The functions (a class as a whole) of the text `source` that write or send: {module.name: their source}."
    found = {}
    for node in ast.parse(source).body:
        calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and is_way_out(n)]
        if calls:
            found[f"{module}.{getattr(node, 'name', 'module')}"] = ast.unparse(node)
    return found


def package():
    "`ways_out` of every module of the package, under its name without `valor.`."
    root, found = Path(valor.__file__).parent, {}
    for path in sorted(root.rglob("*.py")):
        found |= ways_out(path.read_text(), ".".join(path.relative_to(root).with_suffix("").parts))
    return found


def test_every_way_out_is_known():
    found = package()
    assert set(found) - set(WAYS_OUT) == set(), (
        "name it in WAYS_OUT; where it may carry restricted studies, put it inside "
        "valor.data.restricted.guarded_output"
    )
    assert set(WAYS_OUT) - set(found) == set(), "no longer there"


def test_what_is_called_guarded_opens_the_guard():
    found = package()
    for name, why in WAYS_OUT.items():
        if why.startswith("guarded: "):
            assert f"with {why.removeprefix('guarded: ')}(" in found[name], name
    for module, function in (
        ("runs/phases", "ensure"),
        ("data/studies", "load_studies"),
        ("results/zeroshot", "ask"),
        ("results/zeroshot", "_run"),
        ("figures", "save"),
    ):
        source = (Path(valor.__file__).parent / f"{module}.py").read_text()
        body = next(n for n in ast.parse(source).body if getattr(n, "name", "") == function)
        assert any(isinstance(n, ast.With) for n in ast.walk(body)) and (
            "guarded_output(" in ast.unparse(body) or "_guarded(" in ast.unparse(body)
        ), function


def test_the_list_finds_a_new_way_out():
    assert set(
        ways_out(
            "def f(p): p.write_text('x')\ndef g(p): open(p, 'a')\ndef h(p): open(p).read()\ndef i(u): "
            "requests.post(u)",
            "m",
        )
    ) == {"m.f", "m.g", "m.i"}


PAGES = [
    p for p in Path(__file__).parents[1].glob("nbs/**/*.ipynb") if '"#| default_exp' not in p.read_text()
]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_a_page_writes_through_the_package(path):
    cells = [c["source"] for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    source = "\n".join(
        l for c in cells for l in "".join(c).splitlines() if not l.lstrip().startswith(("%", "!"))
    )
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and is_way_out(n)]
    assert [ast.unparse(c.func) for c in calls if getattr(c.func, "id", "") != "save"] == [], (
        "through figures.save or figures.save_page"
    )


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "clone/.git").mkdir(parents=True)
    return tmp_path / "clone"


def mine(tmp_path):
    (tmp_path / "films").mkdir(exist_ok=True)
    import numpy as np
    from PIL import Image

    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 50)).astype(np.uint8)).save(
            tmp_path / f"films/{i}.png"
        )
    rows = [
        dict(
            image=f"films/{i}.png",
            report=f"The heart is normal in size, film {i}.",
            split="train" if i < 5 else "test",
        )
        for i in range(8)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
    return preset(
        "smoke",
        benchmark="table",
        data_root=str(tmp_path / "mine.csv"),
        sections="report",
        n_train=4,
        n_test=2,
        data_options=dict(view="listed"),
    )


def test_a_run_on_restricted_studies_is_its_owners_and_never_in_a_repository(tmp_path, clone, monkeypatch):
    cfg = mine(tmp_path)
    monkeypatch.setenv("VALOR_CACHE", str(clone / "cache"))
    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    with pytest.raises(PlaceError, match="set VALOR_CACHE"):
        phases.ensure("data", cfg)
    monkeypatch.setenv("VALOR_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o022)
    try:
        folder = phases.ensure("data", cfg)
    finally:
        os.umask(before)
    assert all(
        oct(p.stat().st_mode & 0o077) == "0o0"
        for home in ("runs", "cache")
        for p in (tmp_path / home).rglob("*")
    )
    (tmp_path / "runs").rename(clone / "runs")  # and once moved, it is not opened there
    monkeypatch.setenv("VALOR_RUNS", str(clone / "runs"))
    for use in (
        lambda: phases.ensure("data", cfg),
        lambda: phases.load_data(clone / "runs" / folder.name),
    ):
        with pytest.raises(PlaceError, match="lies in a repository"):
            use()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / folder.name).symlink_to(clone / "runs" / folder.name)  # one phase alone
    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "linked"))
    with pytest.raises(PlaceError, match="lies in a repository"):
        phases.ensure("data", cfg)


def test_figures_of_restricted_studies_go_among_the_runs(tmp_path, clone, monkeypatch):
    cfgs = [preset("laptop", benchmark="table", data_root=str(tmp_path))]
    monkeypatch.delenv("VALOR_FIGURES", raising=False)
    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    path = figures.save("small", pd.DataFrame(dict(a=[1])), cfgs=cfgs)[0]
    assert path.parent == tmp_path / "runs/results/table" and oct(path.stat().st_mode & 0o077) == "0o0"
    for write in (
        lambda: figures.save("small", pd.DataFrame(dict(a=[1])), cfgs=cfgs, out=clone),
        lambda: figures.save_page("small", "x", cfgs, clone),
    ):
        with pytest.raises(PlaceError, match="VALOR_FIGURES"):
            write()
    assert figures.place_of([preset("laptop")]) == figures.figures_dir() and not list(clone.glob("small*"))


def test_reports_of_anybodys_films_in_a_repository_are_closed_to_others_and_said(clone, tmp_path, capsys):
    from types import SimpleNamespace

    from valor.policy.generate import run_generate

    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="no such folder"):
        run_generate(
            SimpleNamespace(
                images=tmp_path / "a.png", out=str(clone / "r.jsonl"), model="./none", adapter=None
            ),
            {},
        )
    assert f"lies in a repository ({clone})" in capsys.readouterr().err and not (clone / "r.jsonl").exists()


def test_a_data_report_is_not_written_into_a_repository(clone, tmp_path, monkeypatch):
    from types import SimpleNamespace

    mine(tmp_path)
    with pytest.raises((SystemExit, PlaceError), match="lies in a repository"):
        data_report.run_report(
            SimpleNamespace(
                source="table", root=str(tmp_path / "mine.csv"), preset="valor", out=clone / "report"
            ),
            {},
        )
    assert not (clone / "report").exists()


@pytest.mark.parametrize("study", ["../../pwn", "/abs/x", "a/b", "..", "x" * 300])
def test_an_id_never_leads_out_of_the_folder_of_maps(tmp_path, study):
    import numpy as np

    from valor.results.attention import write_maps
    from valor.results.gallery import attention_of

    maps = np.full((1, 4, 4), 1 / 16, np.float32)
    paths = write_maps(tmp_path / "in/maps", pd.DataFrame(dict(row=[0])), maps, [study], "phantom")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == paths and paths[
        0
    ].parent == tmp_path / "in/maps"
    assert attention_of(tmp_path / "in/maps", [study])[0] is not None  # and the gallery finds it
