"""Fail unless the package is what the notebooks export, the notebooks are clean, and the README is what index.ipynb renders to."""
import shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".py", ".ipynb", ".md")}


def changed(before, after): return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def readme(root):
    "README.md as rendered from nbs/index.ipynb."
    subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--to", "markdown", "--log-level", "ERROR", "--TagRemovePreprocessor.enabled=True",
                    "--TagRemovePreprocessor.remove_cell_tags=hide", "--output-dir", str(root), "--output", "README", str(root / "nbs/index.ipynb")], check=True)
    page = root / "README.md"
    page.write_text(page.read_text().replace("](../figures", "](figures"))


def main(fix=False):
    with tempfile.TemporaryDirectory() as d:
        copy = ROOT if fix else Path(d) / "valor"
        before = {name: files(ROOT / name) for name in ("valor", "nbs")} | {".": files(ROOT)}
        if not fix: shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".scorers", "runs", ".git", "figures", "_proc"))
        for command in ("nbdev_export", "nbdev_clean"): subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True)
        readme(copy)
        wrong = [f"{name}/{f}" for name, old in before.items() for f in changed(old, files(copy / name))]
    if wrong and not fix: sys.exit("out of step (run `python tests/check_notebooks.py --fix`): " + ", ".join(wrong))
    print("notebooks, package and README are in step")


if __name__ == "__main__": main("--fix" in sys.argv)
