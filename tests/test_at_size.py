"""Training at size, as far as a CPU can tell: ready accelerate configurations, SFT in parts, arguments
for vLLM and 4 bits, and the GPU benchmark's script."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from test_two_processes import CONFIGS
from trl import GRPOConfig
from two_processes import IMAGES, WORDS

from valor.config import preset
from valor.policy import models
from valor.policy.models import load_policy, save_policy
from valor.policy.prompt import conversations
from valor.policy.tiny import build_policy
from valor.runs.phases import phase_key
from valor.runs.processes import RunError, share
from valor.train import grpo
from valor.train.sft import sft, shard_by_layer


def env_of(cfg):
    return {k.upper(): str(v).lower() if isinstance(v, bool) else str(v) for k, v in cfg.fsdp_config.items()}


def test_configurations_are_accelerates(monkeypatch):
    """Each file is read by accelerate's own class, which refuses keys that it does not know, and says
    what the notebook says of it."""
    read = {p.stem: load_config_from_file(str(p)) for p in sorted(CONFIGS.glob("*.yaml"))}
    assert {
        name: (c.distributed_type.value, c.num_machines, c.num_processes, c.mixed_precision)
        for name, c in read.items()
    } == {
        "one_gpu": ("NO", 1, 1, "bf16"),
        "several_gpus": ("MULTI_GPU", 1, 8, "bf16"),
        "fsdp2": ("FSDP", 1, 8, "bf16"),
        "nodes": ("FSDP", 4, 32, "bf16"),
        "zero3": ("DEEPSPEED", 1, 8, "bf16"),
    }
    for name in ("fsdp2", "nodes"):
        with monkeypatch.context() as m:
            for k, v in env_of(read[name]).items():
                m.setenv(k, v)
            plugin = FullyShardedDataParallelPlugin()
        assert (
            plugin.fsdp_version == 2
            and plugin.reshard_after_forward is True
            and plugin.cpu_ram_efficient_loading
        )
        assert (
            "FULL" in str(plugin.state_dict_type)
            and plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
        )
    assert (
        read["zero3"].deepspeed_config["zero_stage"] == 3
        and read["zero3"].deepspeed_config["gradient_accumulation_steps"] == "auto"
    )


def test_layers_to_shard_are_in_the_model(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    model, _ = build_policy([WORDS], image_size=32, width=32)
    shard_by_layer(model)
    named = os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")
    assert "MistralDecoderLayer" in named and set(named) <= {type(m).__name__ for m in model.modules()}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Mine")
    shard_by_layer(model)
    assert os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "Mine"
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps=2: .* not the same update under FSDP; expected 1"
    ):
        shard_by_layer(model, 2)


@pytest.fixture
def one_thread():
    """Threads add in another order, and Adam moves a weight of almost no gradient by the sign of that
    rounding error."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ("full", "lora"))
def test_sft_in_parts(mode, tmp_path, one_thread):
    "Reports of different lengths: the mean is over the tokens of the whole batch, however it is cut."
    save_policy(*build_policy([WORDS], image_size=32, width=32), tmp_path / "base")
    data = conversations(
        Dataset.from_dict(dict(image=IMAGES[:4]), features=Features(image=ImageFeature())),
        [WORDS, "<report> no effusion. </report>", WORDS, "<report> edema </report>"],
    )
    logs = {
        parts: sft(
            tmp_path / "base",
            data,
            tmp_path / f"{parts}",
            mode,
            epochs=2,
            lr=1e-4,
            batch_size=4,
            parts=parts,
            checkpointing="on" if parts == 4 else "off",
        )
        for parts in (1, 2, 4)
    }
    whole = load_policy(tmp_path / "1")[0].state_dict()
    assert (
        whole["model.language_model.layers.0.mlp.up_proj.weight"]
        - load_policy(tmp_path / "base")[0].state_dict()["model.language_model.layers.0.mlp.up_proj.weight"]
    ).abs().max() > (1e-4 if mode == "full" else 1e-9)
    for parts in (2, 4):
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(logs[1], logs[parts]) if "loss" in a) < 1e-6
        off = torch.cat(
            [
                (w - whole[n]).abs().flatten()
                for n, w in load_policy(tmp_path / f"{parts}")[0].state_dict().items()
            ]
        )
        assert off.max() < 1e-6 and off.mean() < 1e-9


def test_vllm_arguments(monkeypatch):
    cfg = preset("smoke", vllm_server_url="http://host:8000", vllm_gpu_memory_utilization=0.4)
    with pytest.raises(ValueError, match="package vllm is not installed.*pip install 'trl\\[vllm\\]'"):
        grpo.vllm_args("vllm_colocate", cfg, ["<image>"])
    assert grpo.vllm_args("transformers", cfg, []) == grpo.vllm_args("merged", cfg, []) == {}
    monkeypatch.setattr(grpo, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="vllm_server_url=None"):
        grpo.vllm_args("vllm_server", preset("smoke"), [])
    for rollout in ("vllm_colocate", "vllm_server"):
        args = GRPOConfig(
            output_dir="out",
            bf16=False,
            num_generations=4,
            per_device_train_batch_size=4,
            **grpo.vllm_args(rollout, cfg, ["<image>", "<im_patch>"]),
        )
        assert (
            args.use_vllm
            and args.vllm_mode == rollout.removeprefix("vllm_")
            and args.vllm_server_base_url == "http://host:8000"
            and args.vllm_gpu_memory_utilization == 0.4
        )
        assert args.vllm_importance_sampling_correction is False and args.generation_kwargs == {
            "bad_words": ["<image>", "<im_patch>"]
        }


def test_four_bits(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="policy_weights='nf4'.*bitsandbytes.*pip install"):
        models.frozen_weights("nf4")
    monkeypatch.setattr(models, "find_spec", lambda name: name)
    q = models.frozen_weights("nf4")["quantization_config"]
    assert q.load_in_4bit and q.bnb_4bit_quant_type == "nf4" and q.bnb_4bit_compute_dtype == torch.bfloat16
    assert models.frozen_weights("bfloat16") == dict(dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            dict(gradient_accumulation_steps=3),
            "gradient_accumulation_steps=3 does not divide batch_size * group_size = 8; expected a divisor "
            "of it",
        ),
        (
            dict(gradient_checkpointing="maybe"),
            "gradient_checkpointing='maybe' is not allowed; expected one of 'auto', 'on', 'off'",
        ),
        (
            dict(policy_weights="nf4"),
            "policy_weights='nf4': weights that are trained are held in float32; expected sft_mode='lora'",
        ),
        (dict(vllm_gpu_memory_utilization=1.5), "vllm_gpu_memory_utilization=1.5 is not allowed"),
    ],
)
def test_settings_that_cannot_be(change, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        preset("smoke", **change)


def test_share_in_parts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert share(16, "n", 4) == 4
    with pytest.raises(
        RunError,
        match="n = 8 cannot be shared by 4 processes in gradient_accumulation_steps = 4 parts; make it a "
        "multiple of 16",
    ):
        share(8, "n", 4)


def test_runs_differ_where_results_do():
    "How an update is computed is no part of a run's key; in what precision its frozen weights are held is."

    def key(**kw):
        return phase_key("stage2", preset("smoke", sft_mode="lora", **kw))

    assert (
        key()
        == key(gradient_accumulation_steps=2, gradient_checkpointing="on", overlap_rewards="on")
        != key(policy_weights="bfloat16")
    )


def test_gpu_benchmark_runs(tmp_path):
    """The benchmark's script on a miniature: every figure is there, and its line says that no GPU was
    measured."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("bench_gpu.py")), "--tiny", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | dict(CUDA_VISIBLE_DEVICES=""),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert found["device"] == "CPU"
    assert [name for name, row in found["systems"].items() if row is None] == []
    models = "valor, reward models"
    for system in ("valor", "valor, checkpointing", models, f"{models} beside the reference", "TRL"):
        row = found["systems"][system]
        assert (
            all(row[k] > 0 for k in ("rollout", "rewards", "update", "step", "tokens/s"))
            and row["rollout"] + row["rewards"] + row["update"] <= row["step"] * 1.01
        )
        assert (row["overlap"] is not None) == ("beside" in system)
    assert all(found["radgraph"][what] > 0 for what in ("package", "first epoch", "later epochs"))
    assert "not measured on a GPU" in (tmp_path / "bench_gpu.md").read_text()
