"""The table of contents in nbs/index.ipynb, made from the notebooks: titles, contents, reading times."""

import ast
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
INDEX = NBS / "index.ipynb"
BEGINS = "<!-- made by `python tests/test_docs.py --fix` -->"

CHAPTERS = ("data", "rewards", "expert", "policy", "metrics", "train", "runs", "results")
# notebooks that lie in nbs/ itself, by the beginning of their name
FIRST = "What every chapter builds on."
COMMANDS = "The command `valor`."
PAGES = "Pages that state the runs they need and show a table or figure. Most of them start the runs that "
PAGES += "are missing; page 14 does so only with `-p train true`."


def minutes(cells: list) -> int:
    "Reading time of a notebook in steps of five minutes: 200 words or 20 lines of code a minute."
    words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    code = [cell.source for cell in cells if cell.cell_type == "code" and "#| hide" not in cell.source]
    lines = sum(bool(line.strip()) for source in code for line in source.splitlines())
    return max(5, 5 * round((words / 200 + lines / 20) / 5))


def opening(cells: list) -> tuple[str, str]:
    "`(title, sentence)` of a notebook: what it holds is its `> one line`, else its first sentence."
    text = next(cell.source for cell in cells if cell.cell_type == "markdown")
    title, _, rest = text.partition("\n")
    quote = re.search(r"^> *(.+)", rest, flags=re.M)
    sentence = quote[1] if quote else re.split(r"(?<=[.;?])\s", " ".join(rest.split()), maxsplit=1)[0]
    return title.lstrip("# "), unlinked(sentence)


def unlinked(text: str) -> str:
    "`text` without its links, which lead from the notebook's own folder."
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def row(path: Path, cells: list) -> str:
    "A row of the table: link, sentence, minutes."
    title, sentence = opening(cells)
    return f"| [{title}]({path.relative_to(NBS)}) | {sentence} | {minutes(cells)} |"


def section(heading: str, about: str, paths: list[Path]) -> str:
    "A heading, a sentence and the table of the notebooks `paths`."
    cells = {path: nbformat.read(path, 4).cells for path in paths}
    total = sum(minutes(found) for found in cells.values())
    head = [f"## {heading}", "", f"{about} {total} minutes in all.", ""]
    table = ["| notebook | what it holds | minutes |", "|---|---|---|"]
    return "\n".join(head + table + [row(path, cells[path]) for path in paths])


def chapter(folder: str) -> str:
    "The section of a chapter; its sentence is the docstring of the package."
    source = (ROOT / "valor" / folder / "__init__.py").read_text()
    title, _, about = (ast.get_docstring(ast.parse(source)) or folder).partition(": ")
    about = about[:1].upper() + about[1:]
    return section(title, f"`valor.{folder}`. {about}", sorted((NBS / folder).glob("[0-9]*.ipynb")))


def contents() -> str:
    "The whole table of contents as Markdown."
    top = sorted(NBS.glob("[0-9]*.ipynb"))
    parts = [
        section("First", FIRST, [p for p in top if p.name < "07"]),
        *map(chapter, CHAPTERS),
        section("Commands", COMMANDS, [p for p in top if "07" <= p.name < "08"]),
        section("Tables and figures of the paper", PAGES, [p for p in top if p.name >= "08"]),
    ]
    return BEGINS + "\n\n" + "\n\n".join(parts)


def cell_of(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "The cell of index.ipynb that holds the table of contents."
    return next(cell for cell in notebook.cells if cell.source.startswith(BEGINS))


def write() -> None:
    "Write the table of contents into index.ipynb."
    notebook = nbformat.read(INDEX, 4)
    cell_of(notebook).source = contents()
    INDEX.write_text(nbformat.writes(notebook).rstrip("\n") + "\n")
