"""Every command that README, docs and chapters show has options and parameters that exist.

Those of README and of docs/real-models-and-data.md also run, in order, on miniatures in the true formats."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import urllib.request
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import trees
from papermill import inspect_notebook

from valor.cli import command_parser, main
from valor.config import PRESETS, Config, parse_settings, runs_dir
from valor.policy import server
from valor.runs import phases, processes, systems
from valor.testing import miniature_biomedclip, miniature_chexbert, miniature_llava_med, miniature_radgraph

ROOT = Path(__file__).resolve().parents[1]
TOOLS = r"(?:[A-Z_]+=\S+ )*(?:valor|papermill|python|accelerate launch|torchrun|make|snakemake)"
CHAPTERS = sorted((ROOT / "nbs").rglob("*.ipynb"))


def blocks_and_lines(text):
    "`(commands in code blocks, commands in backticks within a line)` of Markdown, without their comments."
    blocks, inline, inside = [], [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside and re.match(TOOLS + " ", line):
            blocks.append(re.sub(r"\s+#.*| …(?= |$)", "", line).strip())
        elif not inside:
            inline += re.findall(f"`({TOOLS} [^`]+)`", line)
    return blocks, inline


def shown(page):
    "`blocks_and_lines` of a Markdown file or a notebook."
    if page.suffix == ".md":
        return blocks_and_lines(page.read_text())
    cells = nbformat.read(page, 4).cells
    return blocks_and_lines("\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown"))


README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = sorted({(p.stem, command) for p in PAGES + CHAPTERS for kind in shown(p) for command in kind})
# those that are run, each once: first the page that explains them, since each uses what earlier ones leave
RUN = list(dict.fromkeys([*shown(ROOT / "docs/real-models-and-data.md")[0], *sum(shown(README), [])]))


def check_valor(words):
    """Raise unless the parser takes `words`, and every `--set` names a field and `--preset` a preset. Of a
    command with nothing but options without a value, as text mentions it, only the names are checked."""
    if all(word.startswith("--") for word in words[1:]):
        command, *mentioned = words
        subcommands = command_parser()._subparsers._group_actions[0].choices
        if command.startswith("--"):
            assert f"{command}" in command_parser().format_help()
        else:
            assert set(mentioned) <= {"--help", *subcommands[command]._option_string_actions}
        return
    args = command_parser().parse_args(words)
    if words[0] not in ("run", "train"):
        return
    assert args.preset in PRESETS and parse_settings(args.set).keys() <= {
        f.name for f in dataclasses.fields(Config)
    }


def check_papermill(words):
    "Raise unless the page exists and has every parameter that is given."
    import yaml

    known, given = inspect_notebook(str(ROOT / words[0])), []
    for option, value in zip(words, words[1:]):
        if option == "-p":
            given.append(value)
        if option == "-y":
            given += yaml.safe_load(value)
    assert given and set(given) <= known.keys(), (given, list(known))


@pytest.mark.parametrize("page,command", SHOWN, ids=lambda v: v[:60])
def test_every_command_that_is_shown_has_the_options_it_names(page, command):
    words = shlex.split(command.replace(" …", ""))
    while re.match("[A-Z_]+=", words[0]):
        words.pop(0)
    if (
        "-m" in words and words[words.index("-m") + 1] == "valor"
    ):  # torchrun and accelerate start it, or Python itself
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        words = words[words.index("-m") + 1 :]
    if words[0] == "valor":
        check_valor(words[1:])
    elif words[0] == "papermill":
        check_papermill(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[0] == "python":
        script = next(w for w in words if w.endswith(".py"))
        assert (ROOT / script).is_file() or any((ROOT / "valor").rglob(script))
    elif words[0] == "snakemake" and "--profile" in words:
        assert (ROOT / words[words.index("--profile") + 1] / "config.yaml").is_file()
    else:
        assert "…" in command, (
            f"{command}: say in this test how it is checked"
        )  # `accelerate launch … -m valor train`


# --- the README's and those of docs/real-models-and-data.md, one after the other in one folder

SMALL = dict(
    threads=1,
    n_train=8,
    n_val=2,
    n_test=4,
    image_size=64,
    expert_steps=1,
    base_studies=16,
    warmup_epochs=0,
    sft_epochs=1,
    sft_batch_size=4,
    stage1_steps=1,
    stage2_steps=1,
    group_size=2,
    batch_size=1,
    max_new_tokens=4,
    lora_r=2,
    lora_alpha=4,
    n_boot=10,
    k_clin=1,
    eval_steps=1,
    eval_studies=2,
    eval_batch_size=2,
    save_steps=1,
)
HUB = dict(
    chexbert="rules", radgraph="rules", expert="models/biomedclip"
)  # what `paper` would take from the hub


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with everything that the commands name, under their names; `/models`, `/data` and `~` lie
    in it."""
    desk = tmp_path_factory.mktemp("desk")
    miniature_llava_med(desk / "llava-med-v1.5-mistral-7b")
    miniature_biomedclip(desk / "models/biomedclip")
    miniature_chexbert(desk / "models")
    shutil.copytree(miniature_radgraph(desk / "made")[0], desk / "models/radgraph-xl")
    trees.kaggle(desk / "data/indiana", 24)
    trees.mimic(desk / "data/mimic-cxr-jpg", 24)
    shutil.copytree(desk / "data/mimic-cxr-jpg/files", desk / "data/mimic-cxr/files")
    rows = [dict(image=f"img/{i}.png", report=" ".join(trees.texts(i))) for i in range(1, 25)]
    for i in range(1, 25):
        trees.film(desk / rows[i - 1]["image"], i)
    pd.DataFrame(rows).to_csv(desk / "mine.csv", index=False)
    for i in (1, 2):
        trees.film(desk / f"films/{i}.png", i)
    (desk / "pairs.jsonl").write_text(
        "".join(
            json.dumps(dict(id=i, candidate=trees.texts(i)[1], reference=trees.texts(i + i % 2)[1])) + "\n"
            for i in range(12)
        )
    )
    (desk / "prompts.txt").write_text("Describe this chest X-ray.\nWrite a report of this film.\n")
    guide = (ROOT / "docs/adding-your-own.md").read_text()
    (desk / "mylab.py").write_text(re.search(r"```python\n(# mylab\.py\n.*?)```", guide, re.S)[1])
    return desk


def newest(pattern):
    return max((p for p in runs_dir().glob(pattern) if p.is_dir()), key=lambda p: p.stat().st_mtime)


def here(word, desk):
    """`word` of a command with its paths in `desk`; the `…` of a run's folder stands for the newest one,
    that of an adapter's base for its own."""
    word = re.sub(r"(?<![\w.~-])/(models|data)/", rf"{desk}/\1/", word).replace("~/", f"{desk}/")
    for phase in re.findall(r"runs/(\w+)-…", word):
        if phase == "sft":
            found = json.loads(
                (
                    newest(
                        json.loads((newest("stage2-*") / "config.json").read_text())["config"]["after"][
                            "stage1"
                        ]
                    )
                    / "config.json"
                ).read_text()
            )["config"]["after"]["sft"]
        else:
            found = newest(f"{phase}-*").name
        word = word.replace(f"runs/{phase}-…", f"{desk}/runs/{found}")
    return word


def small(words, **more):
    "The command with as little work as the machine can tell from none; what it sets itself stays."
    given = {w.partition("=")[0] for w in words}
    return words + [
        w
        for name, value in (SMALL | more).items()
        if name not in given
        for w in ("--set", f"{name}={json.dumps(value)}")
    ]


def run_to(phase, **more):
    "`valor run`, which ends with `phase` (None: as it does)."

    def run(words, monkeypatch, said):
        def part(cfgs, out):
            phases.ensure(phase, cfgs[0])
            raise processes.RunError("far enough")

        if phase:
            monkeypatch.setattr(systems, "main_job", part)
        if not phase:
            main(small(words, **more))
            assert "VALOR w/o visual" in said().out
            return
        with pytest.raises(SystemExit, match="far enough"):
            main(small(words, **more))

    return run


def gallery(words, monkeypatch, said):
    main(words)
    assert Path("reading.html").stat().st_size > 10_000


def serve(words, monkeypatch, said):
    "The server is asked once, and then interrupted."

    def asked(self, timeout=None):
        name, url = re.search(r"(\S+) at (http://\S+)", said().out).groups()
        body = json.dumps(
            dict(model=name, max_tokens=4, messages=[dict(role="user", content="Describe.")])
        ).encode()
        request = urllib.request.Request(
            f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions",
            body,
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            assert json.load(answer)["choices"]
        raise KeyboardInterrupt

    monkeypatch.setattr(
        server, "threading", type("", (), dict(vars(server.threading), Event=type("", (), dict(wait=asked))))
    )
    main([w if w != "8000" else "0" for w in words])


def plain(expected):
    def run(words, monkeypatch, said):
        main(words)
        assert re.search(expected, said().out)

    return run


def makes(words, monkeypatch, said):
    subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)


def options_only(words, monkeypatch, said):
    "Needs GPUs: test_every_command_… reads its options, tests/test_at_size.py its configuration."


HOW = [  # (beginning of a command, how it is run at miniature size)
    ("make ", makes),
    ("papermill ", options_only),  # their parameters are checked above; tests/test_papermill.py runs pages
    ("valor --version", options_only),  # it ends the process: tests/test_settings.py
    ("valor config", plain(r"lr = ")),
    ("valor convert-llava-med ", plain("all equal to the original's")),
    ("valor run --preset paper --set base=llava-med-hf --dry-run", plain("GPU-hours: ")),
    ("valor run --preset paper --set base=llava-med-hf --set expert", run_to(None, **HUB)),
    ("accelerate launch --config_file configs/", options_only),
    ("torchrun --nproc-per-node 2 ", options_only),  # tests/test_two_processes.py runs it
    ("valor run --set prompt=prompts.txt", run_to("data")),
    ("valor run --set prompt=", run_to("data")),
    ("valor run --set 'context=", run_to("data")),
    (
        "valor train --preset paper --set base=llava-med-hf --set expert=",
        lambda words, monkeypatch, said: main(small(words, **HUB)),
    ),
    ("valor watch runs/", options_only),  # needs the newest job to have that phase: tests/test_watch.py
    (
        "valor watch",
        lambda words, monkeypatch, said: plain("step 2 of")([*words, "--once"], monkeypatch, said),
    ),
    ("valor merge ", plain("my-policy")),
    (
        "valor evaluate-on ",
        lambda words, monkeypatch, said: plain("VALOR, openi_rendered")(
            small([*words, "--n-test", "8"]), monkeypatch, said
        ),
    ),
    ("valor generate ", plain("2 reports written, 0 images could not be read")),
    ("valor serve ", serve),
    ("valor gallery ", gallery),
    ("valor data-report kaggle_indiana ", plain("## Leakage")),
    ("valor run --set benchmark=kaggle_indiana ", run_to("data")),
    (
        "valor run --preset paper --set base=llava-med-hf --set benchmark=mimic_cxr_jpg ",
        run_to("data", **HUB),
    ),
    ("valor run --set benchmark=table ", run_to("sft")),
    ("valor run --preset paper --set base=llava-med-hf --set chexbert=", run_to("data", **HUB)),
    ("valor run --set 'extra_rewards=", run_to("stage1")),
    (
        "valor evaluate ",
        lambda words, monkeypatch, said: plain("BLEU-4")([*words, "--n-boot", "10"], monkeypatch, said),
    ),
]


@pytest.mark.parametrize("command", RUN, ids=lambda c: c[:60])
def test_the_commands_run(command, desk, monkeypatch, capsys):
    found = [how for start, how in HOW if command.startswith(start)]
    assert found, f"{command}: a new example; say in HOW how it is run at miniature size"
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(str(desk))
    for name, value in dict(
        VALOR_RUNS=desk / "runs", VALOR_CACHE=desk / "cache", VALOR_FIGURES=desk / "figures"
    ).items():
        monkeypatch.setenv(name, str(value))
    words = [here(w, desk) for w in shlex.split(command)[1:]]
    found[0]([w.replace("distilroberta-base", "minilm") for w in words], monkeypatch, capsys.readouterr)


def test_no_example_is_missed():
    assert len(RUN) >= len(HOW)
    assert all(any(command.startswith(start) for command in RUN) for start, _ in HOW)
