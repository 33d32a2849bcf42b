"""README, docs and the table of contents: links lead somewhere, numbers are those of figures/, examples run.

python tests/test_docs.py --fix    # writes the tables' numbers and the table of contents anew
"""

import os
import re
import subprocess
import sys
import tomllib
from functools import lru_cache
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import table_of_contents

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def name(path):
    return str(path.relative_to(ROOT))


# --- links


@lru_cache(None)
def prose(page):
    "The Markdown of `page` (a Markdown file or a notebook, Markdown outputs included) without its code."
    if page.suffix == ".md":
        text = page.read_text()
    else:
        cells = nbformat.read(page, 4).cells
        texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
        outputs = [out for cell in cells for out in cell.get("outputs", []) if "data" in out]
        text = "\n\n".join(
            texts + [out.data["text/markdown"] for out in outputs if "text/markdown" in out.data]
        )
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "code", text)


def links(page):
    "Targets of all links and pictures of `page`, in order."
    text = prose(page)
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    references = re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.M)
    return inline + references + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)


def slug(heading):
    "The anchor that GitHub gives to a heading."
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@lru_cache(None)
def anchors(page):
    "All anchors of `page`: GitHub's and, of a notebook, JupyterLab's."
    text = page.read_text() if page.suffix == ".md" else prose(page)
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, flags=re.M)
    found = {slug(h) for h in headings}
    return found if page.suffix == ".md" else found | {h.replace(" ", "-") for h in headings}


def fault_of(link, page):
    "What is wrong with a relative `link` of `page`; None if nothing is, and for links to the web."
    if re.match(r"(https?|mailto|data|attachment):", link):
        return None
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(ROOT):
        return "leaves the repository"
    if not target.exists():
        return "no such file"
    if anchor and target.suffix in (".md", ".ipynb") and anchor not in anchors(target):
        return f"no such heading in {name(target)}"
    return None


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name)
def test_links_lead_somewhere(page):
    faults = {link: fault for link in links(page) if (fault := fault_of(link, page))}
    assert not faults


def test_a_dead_link_is_noticed():
    page = ROOT / "README.md"
    assert fault_of("docs/nothing.md", page) == "no such file"
    assert fault_of("docs/results.md#nothing", page) == "no such heading in docs/results.md"
    assert fault_of("../elsewhere.md", page) == "leaves the repository"
    assert fault_of("docs/results.md#the-main-table", page) is None


# --- numbers: a table under `<!-- numbers: FILE; FORM; … -->` shows what FILE holds
#
# wide: a row a system (with a column `data`, on one data set), a column a metric; cells are "value [lo, hi]";
#       a column `seeds` has their number
# rows: a row is the one row of FILE that has its words; further parts are `column=word`, which selects rows,
#       and `header=column`, where a column of the table has another name in FILE ("lo,hi" is an interval)

MARKED = re.compile(r"<!-- numbers: (.+?) -->\n\n((?:\|.*\n)+)")
WIDE_KEYS = ("data", "system")
KEYS = ("system", "data", "metric", "name", "measure", "reading", "chosen by", "variant", "expert", "a", "b")


def three(value, column=""):
    "A number as the tables show it; a text as it is."
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return ""
    if column in ("n", "studies", "mentions", "tokens/s", "same_sign", "seed", "seeds", "accepted"):
        return f"{int(value):,}"
    if column in ("p", "p_holm") and value < 0.001:
        return "< 0.001"
    return f"{value:.3f}"


def interval(row, low, high):
    return "" if pd.isna(row[low]) else f"[{three(row[low])}, {three(row[high])}]"


def one_row(frame, words):
    "The one row of `frame` that has `words`: {column: word}."
    for column, word in words.items():
        frame = frame[frame[column] == word]
    assert len(frame) == 1, f"{words}: {len(frame)} rows"
    return frame.iloc[0]


def wide_cell(frame, header, cells):
    "The cell of the metric `header` (or `seeds`: how many) for the system that `cells` name."
    if header == "seeds":
        return str(frame[frame.system == cells["system"]].seeds.max())
    named = {column: cells[column] for column in WIDE_KEYS if column in cells}
    row = one_row(frame, named | dict(metric=header))
    return f"{three(row['value'])} {interval(row, 'lo', 'hi')}"


def row_cell(frame, header, cells, aliases, chosen):
    "The cell under `header` of the row that the words among `cells` name; what the file does not have stays."
    columns = {h: aliases.get(h, h) for h in cells}
    column = columns[header]
    if column in KEYS or not set(column.split(",")) <= set(frame.columns):
        return cells[header]
    row = one_row(frame, chosen | {c: cells[h] for h, c in columns.items() if c in KEYS})
    return interval(row, *column.split(",")) if "," in column else three(row[column], column)


def memory_cell(header, cells):
    "The cell of the table of what fits on a GPU, as computed by `valor.train.memory`."
    from valor.train import memory

    columns = {"parts": "gradient_accumulation_steps", "peak (GB)": "peak"}
    if header not in columns:
        return cells[header]
    fits = memory.fits(memory.shape_of(memory.llava_med_7b()))
    fits = fits[(fits.checkpointing == "on") & (fits.weights == cells["weights"])]
    row = one_row(fits.astype({"GPU (GB)": str}), {"GPU (GB)": cells["GPU (GB)"]})
    return str(row[columns[header]])


def filled(match):
    "A marked table with the numbers that it should show."
    source, *rest = [part.strip() for part in match[1].split(";")]
    lines = match[2].splitlines()
    headers = [h.strip() for h in lines[0].strip("|").split("|")]
    frame = pd.read_csv(ROOT / source) if source.endswith(".csv") else None
    given = dict(part.split("=", 1) for part in rest[1:])
    aliases = {h: column for h, column in given.items() if h in headers}
    chosen = {column: word for column, word in given.items() if column not in headers}
    out = lines[:2]
    for line in lines[2:]:
        cells = dict(zip(headers, [c.strip() for c in line.strip().strip("|").split("|")]))
        for header in headers:
            if frame is None:
                cells[header] = memory_cell(header, cells)
            elif rest[0] == "rows":
                cells[header] = row_cell(frame, header, cells, aliases, chosen)
            elif header not in WIDE_KEYS:
                cells[header] = wide_cell(frame, header, cells)
        out.append(f"| {' | '.join(cells.values())} |".replace("  ", " "))
    return f"<!-- numbers: {match[1]} -->\n\n" + "\n".join(out) + "\n"


def with_numbers(text):
    return MARKED.sub(filled, text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_show_what_the_files_hold(page):
    text = page.read_text()
    assert len(re.findall("^<!-- numbers:", text, flags=re.M)) == len(MARKED.findall(text))
    shown, true = text.splitlines(), with_numbers(text).splitlines()
    wrong = [(a, b) for a, b in zip(shown, true) if a != b]
    assert not wrong, "run `python tests/test_docs.py --fix`, and read whether the sentences still hold"


def test_no_result_is_typed_by_hand():
    "Three decimals or more stand only in tables that are compared with a file."
    for page in (ROOT / "README.md", ROOT / "docs/results.md"):
        text = re.sub(r"^```.*?^```", "", MARKED.sub("", page.read_text()), flags=re.M | re.S)
        text = re.sub(r"\]\([^)]*\)", "", text)  # names of files
        assert re.findall(r"\d*\.\d{3,}", text) == []


def test_every_table_and_figure_has_its_record():
    "A .json beside each file of figures/ says which runs it is from (phase_times.csv is itself a record)."
    made = [*ROOT.glob("figures/*.csv"), *ROOT.glob("figures/*.png"), *ROOT.glob("figures/seeds/*.csv.gz")]
    records = {path: path.with_name(re.sub(r"\.(csv|png|csv\.gz)$", ".json", path.name)) for path in made}
    assert len(made) > 100
    alone = [path.name for path, record in records.items() if not record.exists()]
    assert alone == ["phase_times.csv"]


def test_each_setting_of_each_method_was_tried_on_each_benchmark():
    "Learning rate, β and batch: a column with two values or more in a figures/tune_BENCHMARK_METHOD_*.csv."
    of_stages = ["lr", "beta", "batch_size"]
    settings = {"sft": ["sft_lr", "sft_batch_size"], "stage2": of_stages, "grpo": of_stages}
    settings["dpo"] = ["dpo_lr", "dpo_beta", "batch_size"]
    settings["mmedpo"] = ["mmedpo_lr", "dpo_beta", "batch_size"]
    older = {("phantom", "mmedpo"): {"dpo_lr": "mmedpo_lr"}}  # from before MMedPO had a rate of its own
    for benchmark in ("phantom", "openi_rendered", "r2gen_iu"):
        for method, wanted in settings.items():
            paths = ROOT.glob(f"figures/tune_{benchmark}_{method}_*.csv")
            grids = [pd.read_csv(path).rename(columns=older.get((benchmark, method), {})) for path in paths]
            tried = {name for grid in grids for name in grid if grid[name].nunique() > 1}
            assert not set(wanted) - tried, f"{benchmark}, {method}"


# --- the pages themselves


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def examples(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=name)
def test_examples_run(page, tmp_path):
    """The Python blocks of a page, in order, in a process of their own, because they register things; a block
    whose first line is a comment `# file.py` is that file too."""
    for block in examples(page):
        if file := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / file[1]).write_text(block)
    script = tmp_path / "all_examples.py"
    script.write_text("\n".join(examples(page)))
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_picture_of_the_arrows_has_the_layers_of_the_contract():
    text = (ROOT / "docs/architecture.md").read_text()
    drawn = re.search(r"^flowchart LR\n(.*?)```", text, flags=re.M | re.S)[1]
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [set(re.findall(r"\w+", layer)) for layer in contract["layers"]]
    boxes = [
        set(re.findall(r"[a-z]+", box.replace("br/", ""))) for box in drawn.replace("\n", "-->").split("-->")
    ]
    names = {"low", "shared", "parts"}  # of boxes that hold several
    shown = [box - names for box in boxes if box - names]
    assert shown == [layer for layer in reversed(layers) if layer != {"__main__"}]


# --- the table of contents


def test_the_table_of_contents_is_up_to_date():
    cell = table_of_contents.cell_of(nbformat.read(table_of_contents.INDEX, 4))
    assert cell.source == table_of_contents.contents(), "run `python tests/test_docs.py --fix`"


def test_the_table_of_contents_names_every_notebook():
    listed = re.findall(r"\]\(([\w/]+\.ipynb)\)", table_of_contents.contents())
    here = table_of_contents.INDEX
    assert sorted(listed) == sorted(str(p.relative_to(here.parent)) for p in NOTEBOOKS if p != here)


def fix():
    "Write the numbers of all tables and the table of contents anew."
    for page in PAGES:
        page.write_text(with_numbers(page.read_text()))
    table_of_contents.write()


if __name__ == "__main__" and "--fix" in sys.argv:
    fix()
