"""One update is one update, however it is shared out: over two processes (groups that span both are ranked as one, both count k alike) and in parts, one after the other."""
import json, os, subprocess, sys
from pathlib import Path

import pytest, torch

from two_processes import START, WORDS, trained
from valor.config import preset
from valor.grpo import CLINICAL_SCORERS, TEXT_SCORERS, advantages
from valor.policy import build_policy, save_policy


def close(a, b): return (torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item() < 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replayed")
    save_policy(*build_policy([WORDS], image_size=32, width=32), folder / "sft")
    return folder


@pytest.fixture(scope="module")
def one(folder):
    "One process, all of the update at once; its completions are what the others replay."
    one = trained(folder / "one", folder / "sft")
    (folder / "taken.json").write_text(json.dumps(one["sampled"]))
    return one


def same(one, ranks):
    for saw in ranks: assert close(saw["losses"], one["losses"]) and close(saw["gradients"], one["gradients"]) and close(saw["weights"], one["weights"])
    for n, whole in enumerate(one["seen"]):
        assert close([a for saw in ranks for a in saw["seen"][n]["advantages"]], whole["advantages"])
        for saw in ranks: assert saw["seen"][n]["k"] == whole["k"] == START + 1 + n and close(saw["seen"][n]["scores"], whole["scores"])


def test_parts_equal_whole(folder, one):
    assert max(abs(l) for l in one["losses"]) > 1e-4 and one["gradients"].abs().max() > 1e-3      # there is something to compare
    same(one, [trained(folder / "parts", folder / "sft", parts=2, taken=one["sampled"])])


def test_two_processes_equal_one(folder, one):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", str(Path(__file__).with_name("two_processes.py")), str(folder), str(folder / "sft")]
    done = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    for parts in (1, 2): same(one, [r[parts] for r in ranks])
    zero, other = (r[1] for r in ranks)
    assert zero["clinical_calls"] == other["clinical_calls"] == 2 * 2                              # two scorers at k = 6 and 8
    assert torch.equal(zero["weights"], other["weights"])
    cfg = preset("smoke", group_size=4, k_clin=2, rank_norm="unit")
    for a, b in zip(zero["seen"], other["seen"]):
        assert len(a["advantages"]) == len(b["advantages"]) == 2 and len(a["scores"]) == 4          # one group of four, half of it on each
        columns = dict(zip((*TEXT_SCORERS, *CLINICAL_SCORERS, "format", "similarity"), torch.tensor(a["scores"]).T))
        assert close(advantages(columns, a["k"], 4, cfg, 0.5)[1], a["advantages"] + b["advantages"])
