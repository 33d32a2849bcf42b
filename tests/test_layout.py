"""The package as rooms: doors that users come in by, and no circle of imports (the direction of the
arrows is import-linter's, in `make test`)."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "line",
    [
        "from valor.rewards import scorer, rank_reward, rank_norm, is_clinical_step, advantages",
        "from valor.train import grpo_loss",
        "from valor.data import load_studies",
        "from valor.config import preset",
    ],
)
def test_doors(line):
    exec(line, {})


def test_packages_have_the_names_that_they_advertise():
    for folder in sorted((ROOT / "valor").glob("*/__init__.py")):
        package = import_module(f"valor.{folder.parent.name}")
        for name in package.__all__:
            assert callable(getattr(package, name)), f"{package.__name__}.{name}"
            assert not (folder.parent / f"{name}.py").exists(), (
                f"{name} is a module of {package.__name__} too"
            )


def test_no_circle_of_imports():
    "But for the arrows that the contract in pyproject.toml leaves out, by name."
    graph = grimp.build_graph("valor")
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    for arrow in contract["ignore_imports"]:
        graph.remove_import(**dict(zip(("importer", "imported"), arrow.split(" -> "))))
    done, path = set(), []

    def visit(module):
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            visit(imported)
        done.add(path.pop())

    for module in sorted(graph.modules):
        visit(module)


def test_a_command_that_only_helps_imports_no_library():
    code = (
        "import sys; from valor.cli import command_parser; command_parser(); print([m for m in ('torch', "
        "'transformers', 'pandas') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
