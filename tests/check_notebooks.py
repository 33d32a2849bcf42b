"""Fail unless the package is what the notebooks export, and the notebooks are clean and name their kernel."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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


def main(fix=False):
    with tempfile.TemporaryDirectory() as d:
        copy = ROOT if fix else Path(d) / "valor"
        before = {name: files(ROOT / name, pattern) for name, pattern in PARTS}
        if not fix:
            left_out = {
                str(ROOT / name) for name in (".venv", ".scorers", "runs", ".git", "figures", "_proc")
            }
            shutil.copytree(
                ROOT,
                copy,
                ignore=lambda folder, names: [n for n in names if str(Path(folder) / n) in left_out],
            )
        for command in ("nbdev_export", "nbdev_clean"):
            subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True)
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
    print("notebooks and package are in step")


if __name__ == "__main__":
    main("--fix" in sys.argv)
