"""One update is one update, however it is shared out: over two processes (groups that span both are
ranked as one, both count k alike) and in parts, one after the other."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from kills import finish_pair
from safetensors.torch import load_file
from two_processes import START, WORDS, trained

from valor.config import preset
from valor.policy.models import save_policy
from valor.policy.tiny import build_policy
from valor.rewards.compose import CLINICAL_SCORERS, TEXT_SCORERS, advantages
from valor.train.sft import TrainingError, train_to_end

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def close(a, b):
    return (torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item() < 1e-6


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
    for saw in ranks:
        assert (
            close(saw["losses"], one["losses"])
            and close(saw["gradients"], one["gradients"])
            and close(saw["weights"], one["weights"])
        )
    for n, whole in enumerate(one["seen"]):
        assert close([a for saw in ranks for a in saw["seen"][n]["advantages"]], whole["advantages"])
        for saw in ranks:
            assert saw["seen"][n]["k"] == whole["k"] == START + 1 + n and close(
                saw["seen"][n]["scores"], whole["scores"]
            )


def test_parts_equal_whole(folder, one):
    assert (
        max(abs(l) for l in one["losses"]) > 1e-4 and one["gradients"].abs().max() > 1e-3
    )  # there is something to compare
    same(one, [trained(folder / "parts", folder / "sft", parts=2, taken=one["sampled"])])


def test_other_parts_resume(folder, one):
    "Out of memory after two updates: the run goes on with each update in more parts."
    again = trained(
        folder / "again",
        folder / "sft",
        parts=4,
        taken=one["sampled"],
        resume=str(folder / "one" / "checkpoints" / "checkpoint-2"),
    )
    assert [s["k"] for s in again["seen"]] == [START + 3] and close(again["weights"], one["weights"])


def two(folder, how, port, **env):
    "What each of two processes saw."
    finish_pair(
        f"import two_processes; two_processes.main({str(folder)!r}, {how!r})", folder / how, port, 500, **env
    )
    return [torch.load(folder / f"{how} rank{r}.pt", weights_only=True) for r in (0, 1)]


def test_two_processes_equal_one(folder, one):
    ranks = two(folder, "ddp", 29517)
    for how in (1, 2, "merged"):
        # parts; and each prompt read once on each process, in two parts, with rewards in a thread of each
        same(one, [r[how] for r in ranks])
    assert (
        torch.equal(*(r["sampled"]["weights"] for r in ranks))
        and ranks[0]["sampled"]["sampled"] != ranks[1]["sampled"]["sampled"]
    )  # each draws its own candidates, the adapter inside the weights
    zero, other = (r[1] for r in ranks)
    assert zero["clinical_calls"] == other["clinical_calls"] == 2 * 2  # two scorers at k = 6 and 8
    assert torch.equal(zero["weights"], other["weights"])
    cfg = preset("smoke", group_size=4, k_clin=2, rank_norm="unit")
    for a, b in zip(zero["seen"], other["seen"]):
        assert (
            len(a["advantages"]) == len(b["advantages"]) == 2 and len(a["scores"]) == 4
        )  # one group of four, half of it on each
        columns = dict(
            zip((*TEXT_SCORERS, *CLINICAL_SCORERS, "format", "similarity"), torch.tensor(a["scores"]).T)
        )
        assert close(advantages(columns, a["k"], 4, cfg, 0.5)[1], a["advantages"] + b["advantages"])


def test_sharded_equals_one(folder, one):
    """FSDP2 with configs/fsdp2.yaml's choices (float32 here), each layer sharded over two CPU processes;
    the adapter on disk is whole."""
    chosen = load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config
    ranks = two(
        folder,
        "fsdp",
        29519,
        ACCELERATE_USE_FSDP="true",
        **{k.upper(): str(v).lower() if isinstance(v, bool) else str(v) for k, v in chosen.items()},
    )
    for n, update in enumerate(one["seen"]):
        assert close([a for r in ranks for a in r[1]["seen"][n]["advantages"]], update["advantages"])
    assert close(ranks[0][1]["losses"], one["losses"])
    assert {"FSDPMistralDecoderLayer", "FSDPCLIPEncoderLayer"} <= set(ranks[0][1]["sharded"])
    mine, whole = (
        load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in ("fsdp1", "one")
    )
    assert mine.keys() == whole.keys() and all(close(w, whole[n]) for n, w in mine.items())


def test_torchrun_as_the_docs_print_it(tmp_path):
    """The command of docs/real-models-and-data.md with little work: the processes train together, which
    torchrun alone does not tell accelerate on CPUs."""
    page = (CONFIGS.parent / "docs" / "real-models-and-data.md").read_text()
    printed = re.search(r"^torchrun (.*?)  +#", page, re.M)[1]
    small = dict(threads=1, n_train=8, n_test=2, n_val=2, base_studies=8, warmup_epochs=0, max_new_tokens=4)
    small |= dict(stage1_steps=1, sft_epochs=1, sft_batch_size=4)
    words = [*shlex.split(printed), "--until", "stage1"]
    words += [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    env = os.environ | dict(VALOR_RUNS=str(tmp_path / "runs"), CUDA_VISIBLE_DEVICES="")
    env.pop("ACCELERATE_USE_CPU", None)
    torchrun = [sys.executable, "-m", "torch.distributed.run", *words]
    done = subprocess.run(torchrun, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^step \d of 4", done.stdout, re.M)) == 4, done.stdout  # said once, by the first
    record = json.loads(next((tmp_path / "runs").glob("stage1-*/config.json")).read_text())
    assert record["processes"] == 2


def test_processes_that_do_not_know_of_each_other_do_not_train(monkeypatch):
    "Each would train alone and overwrite the other's files."
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        TrainingError, match="2 processes were started together, but accelerate takes them for 1"
    ):
        train_to_end(type("", (), dict(args=type("", (), dict(world_size=1))))(), "SFT")
