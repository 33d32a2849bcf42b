"""Builds the documentation as a site in _site/: `make site`.

README, the pages of docs/ and all notebooks keep their places, so that links between them hold; a page of API
reference is added for each module. Nothing is executed or imported: notebooks show the outputs that they are
committed with. mkdocs.yml names this file as a hook: `on_page_content` is called for every page.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
from table_of_contents import CHAPTERS

SOURCE = ROOT / "_docs"  # what the site is made of
SITE = ROOT / "_site"
SKIPPED = (".github/", ".ci/", ".jupyter/", "tests/", "valor/", "profiles/", "scorers/")


def tracked() -> list[str]:
    "Paths of the files in the repository, those not yet added to git included."
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def copy_pages() -> None:
    "Copy what pages are made of or link to, each file to its own place under `SOURCE`."
    for path in tracked():
        if path.startswith(SKIPPED) or not (ROOT / path).is_file():
            continue
        (SOURCE / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, SOURCE / path)
        if path.endswith(".ipynb"):
            without_machinery(SOURCE / path)


def without_machinery(path: Path) -> None:
    "Take from the notebook `path` the cells that only nbdev reads, and those marked `#| hide`."
    notebook = json.loads(path.read_text())
    hidden = re.compile(r"#\| *(default_exp|hide)\b")
    notebook["cells"] = [cell for cell in notebook["cells"] if not hidden.match("".join(cell["source"]))]
    path.write_text(json.dumps(notebook))


def write_reference() -> None:
    "A page for each module, which mkdocstrings fills from docstrings and types, and one that lists them."
    pages = SOURCE / "api"
    pages.mkdir()
    lines = ["# API reference", ""]
    for path in sorted((ROOT / "valor").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if path.stem in ("_modidx", "__main__") or module == "valor":
            continue
        (pages / f"{module}.md").write_text(f"# `{module}`\n\n::: {module}\n")
        lines.append(f"- [`{module}`]({module}.md)")
    (pages / "index.md").write_text("\n".join(lines) + "\n")


def grouped(paths: list[Path], chapter_of) -> list:
    "Entries of the navigation: the pages without a chapter, then those of each chapter in reading order."
    names = [str(path.relative_to(SOURCE)) for path in paths]
    chapters = [chapter_of(path) for path in paths]
    pages = {c: [n for n, chapter in zip(names, chapters) if chapter == c] for c in CHAPTERS}
    rest = [n for n, chapter in zip(names, chapters) if chapter not in CHAPTERS]
    return rest + [{chapter: listed} for chapter, listed in pages.items()]


def on_config(config):
    "Called by mkdocs first: puts every notebook and every module into the navigation."
    notebooks = [p for p in sorted((SOURCE / "nbs").rglob("*.ipynb")) if p.name != "index.ipynb"]
    modules = [p for p in sorted((SOURCE / "api").glob("*.md")) if p.name != "index.md"]
    entries = {
        "nbs": ["nbs/index.ipynb", *grouped(notebooks, lambda path: path.parent.name)],
        "api": ["api/index.md", *grouped(modules, lambda path: path.stem.split(".")[1])],
    }
    for entry in config.nav:
        for title, pages in entry.items() if isinstance(entry, dict) else ():
            entry[title] = entries.get(pages, pages)
    return config


# kept as they are: code, scripts, styles, tags; as groups: formulas, on a line of their own or within one
PIECES = re.compile(
    r"<(pre|code|script|style|svg)\b.*?</\1>|<[^>]*>"
    r"|\$\$(?P<display>.+?)\$\$|\$(?!\s)(?P<inline>[^$<>\n]+?)(?<!\s)\$(?!\d)",
    flags=re.S,
)


def with_math(page: str) -> str:
    "`page` (HTML) with its formulas as MathML, which browsers show without a script."

    def piece(match: re.Match) -> str:
        formula = match["display"] or match["inline"]
        if not formula:
            return match[0]
        return convert(unescape(formula), display="block" if match["display"] else "inline")

    return PIECES.sub(piece, page)


def with_page_links(page: str) -> str:
    "`page` (HTML) with its links to Markdown files leading to pages; mkdocs does so for Markdown pages only."

    def link(match: re.Match) -> str:
        path = match[1].replace("README.md", "index.md").removesuffix(".md")
        return f'href="{path}.html{match[2]}"'

    return re.sub(r'href="(?!https?:)([^"#]+\.md)((?:#[^"]*)?)"', link, page)


def on_page_content(html: str, page, config, files) -> str:
    "Called by mkdocs with the HTML of each page."
    return with_page_links(with_math(html))


class Links(HTMLParser):
    "Keeps in `found` where the tags of a page lead; code that a page shows has no tags."

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.found.append(re.split("[#?]", value, maxsplit=1)[0])


def links_of(page: str) -> list[str]:
    "Links and sources of the HTML `page`, without what stands behind `#` or `?`; none that stay in the page."
    reader = Links()
    reader.feed(page)
    return [link for link in reader.found if link]


def dead_links() -> list[str]:
    "Links of the built pages that lead to no file of the site. (mkdocs itself checks Markdown pages only.)"
    dead = []
    for page in SITE.rglob("*.html"):
        for link in links_of(page.read_text()):
            outside = re.match(r"[a-z]+:|//", link) or page.name == "404.html"
            if not outside and not (page.parent / unquote(link)).exists():
                dead.append(f"{page.relative_to(SITE)}: {link}")
    return dead


def main() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir()
    copy_pages()
    write_reference()
    (SOURCE / "wide.css").write_text(".md-grid { max-width: 90rem; }\n")  # room for lines of 110 columns
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    if dead := dead_links():
        sys.exit("dead links:\n" + "\n".join(dead))
    print(f"built {SITE / 'index.html'}")


if __name__ == "__main__":
    main()
