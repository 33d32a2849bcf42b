"""JupyterLab as `make lab` starts it: notebooks open unmarked, and what is saved after Run All is clean."""

import asyncio
import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from traitlets.config import PyFileConfigLoader

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def room(tmp_path):
    "A folder with one chapter and the settings that say how notebooks are cleaned."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "rewards" / "04_ranknorm.ipynb", tmp_path / "nbs" / "chapter.ipynb")
    return tmp_path


def contents_manager(room):
    "What reads and saves notebooks in JupyterLab as `make lab` starts it."
    config = PyFileConfigLoader("jupyter_lab_config.py", str(ROOT / ".jupyter")).load_config()
    return config.ServerApp.contents_manager_class(root_dir=str(room / "nbs"), config=config)


def as_run(notebook):
    "`notebook` as JupyterLab holds it after Run All: counts, times, metadata of the kernel and of the cells."
    notebook = copy.deepcopy(notebook)
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = number
        cell.metadata |= {"execution": {"iopub.execute_input": "2026-11-26T12:00:00Z"}, "collapsed": False}
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    notebook.metadata["toc-showtags"] = True
    return notebook


def test_saving_after_run_all_leaves_a_clean_notebook(room):
    path = room / "nbs" / "chapter.ipynb"
    before = path.read_text()
    manager = contents_manager(room)
    model = asyncio.run(manager.get("chapter.ipynb"))
    model["content"] = as_run(nbformat.from_dict(model["content"]))
    asyncio.run(manager.save(model, "chapter.ipynb"))
    saved = json.loads(path.read_text())
    assert all(c.get("execution_count") is None for c in saved["cells"])
    subprocess.run([Path(sys.executable).with_name("nbdev_clean")], cwd=room, check=True)
    assert path.read_text() == before
    assert json.loads(before) == saved


def test_a_notebook_opens_with_what_its_kernel_says_of_itself(room):
    "JupyterLab marks a notebook as changed unless its metadata are equal to these."
    metadata = asyncio.run(contents_manager(room).get("chapter.ipynb"))["content"]["metadata"]
    kernel = KernelManager(kernel_name="python3")
    kernel.start_kernel()
    try:
        client = kernel.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        said = client.kernel_info(reply=True, timeout=60)["content"]["language_info"]
        client.stop_channels()
    finally:
        kernel.shutdown_kernel(now=True)
    assert metadata["language_info"] == said
    spec = kernel.kernel_spec
    assert metadata["kernelspec"] == {
        "name": "python3",
        "display_name": spec.display_name,
        "language": spec.language,
    }
