"""Adapters kept during training change nothing; their evaluation resumes where it was interrupted, and
says which split it needs."""

import hashlib
import os
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from datasets import DatasetDict

from valor.config import preset
from valor.runs import makers, phases, processes


def digest(folder):
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    threads = torch.get_num_threads()
    with patch.dict(os.environ, VALOR_RUNS=str(tmp_path_factory.mktemp("runs"))):
        yield
    torch.set_num_threads(threads)


def test_a_stage_ends_the_same_with_and_without_snapshots(runs):
    watched, not_watched = (
        phases.ensure("stage1", preset("smoke", threads=1, eval_steps=n)) for n in (1, None)
    )
    assert digest(watched) == digest(not_watched)
    assert sorted(p.name for p in (watched / "snapshots").iterdir()) == [
        "k0001",
        "k0002",
        "k0003",
    ]  # the fourth is the adapter itself
    assert not (not_watched / "snapshots").exists()


def test_evaluation_goes_on_where_it_was_interrupted(runs):
    cfg = preset("smoke", threads=1, eval_steps=1)
    folder = phases.ensure("progress_stage1", cfg)
    whole, first = (folder / "progress.csv").read_bytes(), (folder / "frame k0000.csv").stat().st_mtime_ns
    assert pd.read_csv(folder / "progress.csv").k.tolist() == [0, 1, 2, 3, 4]
    for name in ("done.json", "progress.csv", "frame k0003.csv", "frame k0004.csv", "reports k0004.csv"):
        (folder / name).unlink()
    with patch.object(makers, "generate", wraps=makers.generate) as generate:
        phases.ensure("progress_stage1", cfg)
    assert (folder / "progress.csv").read_bytes() == whole and generate.call_count == 2
    assert (folder / "frame k0000.csv").stat().st_mtime_ns == first


def test_data_without_a_validation_split_is_named(runs, tmp_path):
    cfg = preset("smoke", threads=1, eval_steps=1)
    data = phases.load_data(phases.phase_folder("data", cfg))
    with patch.object(makers, "load_data", return_value=DatasetDict({s: data[s] for s in ("train", "test")})):
        with pytest.raises(
            processes.RunError, match="no study is in the split 'val' .there are train, test."
        ):
            phases.MAKERS["progress_stage1"](tmp_path, cfg, {}, "progress_stage1")
