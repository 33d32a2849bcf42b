"""The package as rooms: doors that users come in by, and no circle of imports (the direction of the arrows is import-linter's, in `make test`)."""

import subprocess
import sys

import grimp
import pytest


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


def test_no_circle_of_imports():
    graph = grimp.build_graph("valor")
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
    code = "import sys; from valor.cli import command_parser; command_parser(); print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
