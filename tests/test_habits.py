"""What a command says beside its work: no noise of the libraries, and every parameter of a page where one
asks for them."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from papermill import inspect_notebook

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    p
    for p in sorted((ROOT / "nbs").glob("*.ipynb"))
    if any("parameters" in c.metadata.get("tags", []) for c in nbformat.read(p, 4).cells)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_papermill_lists_every_parameter_of_a_page(page):
    cell = next(c for c in nbformat.read(page, 4).cells if "parameters" in c.metadata.get("tags", []))
    names = {}
    exec(cell.source.replace("declared = dict(globals(), declared=None)", ""), {}, names)
    listed = inspect_notebook(str(page)).keys()
    assert names.keys() <= listed and len(names) > 3


def test_noise_is_silenced_word_for_word():
    code = (
        "import logging, valor, warnings; log = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s.', 'x'); "
        "log.warning('something else')\n"
        "warnings.warn('`is_gradient_checkpointing` is deprecated and will be removed in v6.', "
        "FutureWarning); warnings.warn('`other` is deprecated', FutureWarning)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stderr
    assert "something else" in said and "`other` is deprecated" in said
    assert "gemm" not in said and "checkpointing" not in said
