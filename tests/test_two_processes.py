"""Groups that span two processes are ranked as one, and both count k alike."""
import json, os, subprocess, sys
from pathlib import Path

import torch

from valor.config import preset
from valor.grpo import CLINICAL_SCORERS, TEXT_SCORERS, advantages
from valor.policy import build_policy, save_policy


def test_groups_span_processes(tmp_path):
    save_policy(*build_policy(["<report> the heart is large. no effusion or edema seen. </report>"], image_size=32, width=32), tmp_path / "sft")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", str(Path(__file__).with_name("two_processes.py")), str(tmp_path), str(tmp_path / "sft")]
    done = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert [s["k"] for s in zero["seen"]] == [s["k"] for s in one["seen"]] == [6, 7, 8]
    assert zero["clinical_calls"] == one["clinical_calls"] == 2 * 2        # two scorers at k = 6 and 8
    assert zero["weights"] == one["weights"]
    cfg = preset("smoke", group_size=4, k_clin=2)
    for a, b in zip(zero["seen"], one["seen"]):
        assert a["scores"] == b["scores"] and len(a["scores"]) == 4         # one group of four, gathered from both
        columns = dict(zip((*TEXT_SCORERS, *CLINICAL_SCORERS, "format", "similarity"), torch.tensor(a["scores"]).T))
        assert torch.allclose(advantages(columns, a["k"], 4, cfg, 0.5)[1], torch.tensor(a["advantages"] + b["advantages"]))
