"""Notebooks in JupyterLab as `make lab` starts it: what it saves after Run All is clean."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_server.services.contents.filemanager import FileContentsManager
from traitlets.config import PyFileConfigLoader

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def room(tmp_path):
    "A folder with one chapter and the settings that say how notebooks are cleaned."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "rewards" / "04_ranknorm.ipynb", tmp_path / "nbs" / "chapter.ipynb")
    return tmp_path


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
    config = PyFileConfigLoader("jupyter_lab_config.py", str(ROOT / ".jupyter")).load_config()
    manager = FileContentsManager(root_dir=str(room / "nbs"), config=config)
    model = manager.get("chapter.ipynb", content=True)
    model["content"] = as_run(nbformat.from_dict(model["content"]))
    manager.save(model, "chapter.ipynb")
    saved = json.loads(path.read_text())
    assert all(c.get("execution_count") is None for c in saved["cells"])
    subprocess.run([Path(sys.executable).with_name("nbdev_clean")], cwd=room, check=True)
    assert path.read_text() == before
    assert json.loads(before) == saved
