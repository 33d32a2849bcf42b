"""Fail unless the package is what the notebooks export, the notebooks are clean and name their kernel, no
saved output is an error, and every name that a notebook or a test imports from the package is there."""

import ast
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import table_of_contents

ROOT = Path(__file__).resolve().parents[1]
PARTS = (("valor", "*.py"), ("nbs", "*.ipynb"))
# What JupyterLab needs to start a kernel without asking. nbdev_clean sets display_name to the kernel's name.
METADATA = {
    "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def files(folder, pattern):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob(pattern))
        if p.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in p.parts
    }


def changed(before, after):
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def name_kernel(path):
    "Write `METADATA` into the notebook `path`."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    if notebook["metadata"] | METADATA != notebook["metadata"]:
        notebook["metadata"] |= METADATA
        text = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def names_imported(code):
    "`(module, name)` of every `from valor… import …` in `code`, which may hold lines of shell and magic."
    lines = ["pass" if line.lstrip().startswith(("%", "!")) else line for line in code.splitlines()]
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:  # a cell of `%%bash`
        return []
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
    imports = [n for n in imports if (n.module or "").split(".")[0] == "valor"]
    return [(n.module, alias.name) for n in imports for alias in n.names if alias.name != "*"]


def is_there(module, name):
    "Whether `from module import name` works."
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def missing_names():
    "Lines `file: from module import name` for every import of the package that would fail."
    missing = []
    for path in [*sorted((ROOT / "nbs").rglob("*.ipynb")), *sorted((ROOT / "tests").glob("*.py"))]:
        if ".ipynb_checkpoints" in path.parts:
            continue
        code = [path.read_text(encoding="utf-8")]
        if path.suffix == ".ipynb":
            cells = json.loads(code[0])["cells"]
            code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        for module, name in (pair for part in code for pair in names_imported(part)):
            if not is_there(module, name):
                missing.append(f"{path.relative_to(ROOT)}: from {module} import {name}")
    return missing


def saved_errors(folder=ROOT / "nbs"):
    "Lines `notebook: cell` for every cell whose saved output is an error: a page that ended early."
    return [
        f"nbs/{name}: cell {cell.get('id')}"
        for name, notebook in files(folder, "*.ipynb").items()
        for cell in json.loads(notebook)["cells"]
        if any(output["output_type"] == "error" for output in cell.get("outputs", []))
    ]


def main(fix=False):
    with tempfile.TemporaryDirectory() as d:
        copy = ROOT if fix else Path(d) / "valor"
        before = {name: files(ROOT / name, pattern) for name, pattern in PARTS}
        if not fix:
            left_out = {
                str(ROOT / name)
                for name in (".venv", ".scorers", ".flamingo", "runs", ".git", "figures", "_proc")
            }
            shutil.copytree(
                ROOT,
                copy,
                ignore=lambda folder, names: [n for n in names if str(Path(folder) / n) in left_out],
            )
        for command in ("nbdev_export", "nbdev_clean"):
            subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True)
        if fix:  # a test tells whether it is up to date
            table_of_contents.write()
        for path in (copy / "nbs").rglob("*.ipynb"):
            if ".ipynb_checkpoints" not in path.parts:
                name_kernel(path)
        wrong = [
            f"{name}/{f}"
            for name, old in before.items()
            for f in changed(old, files(copy / name, dict(PARTS)[name]))
        ]
    if wrong and not fix:
        sys.exit("out of step (run `python tests/check_notebooks.py --fix`): " + ", ".join(wrong))
    sys.path.insert(0, str(ROOT))
    if errors := saved_errors():
        sys.exit("saved outputs that are errors: " + "; ".join(errors))
    missing = missing_names()
    if missing:
        sys.exit("imports of names that are not there: " + "; ".join(missing))
    print("notebooks and package are in step")


if __name__ == "__main__":
    main("--fix" in sys.argv)
