"""A run that is killed (SIGKILL) in SFT, stage 1 and stage 2 ends with the weights of one that was not,
bit for bit."""

from kills import digests, kill_everywhere

RUN = """
import sys
from valor.config import preset
from valor.runs.phases import ensure
ensure("stage2", preset("smoke", threads=1))
"""
# where to kill: the first file matching the pattern says that the phase is past its first checkpoint, or
# has just begun
POINTS = [
    "sft-*/policy/checkpoints/checkpoint-4/trainer_state.json",
    "stage1-*/config.json",
    "stage1-*/checkpoints/checkpoint-2/trainer_state.json",
    "stage2-*/checkpoints/checkpoint-2/optimizer.pt",
]


WEIGHTS = (
    "sft-*/policy/model.safetensors",
    "stage*-*/adapter/adapter_model.safetensors",
    "stage*-*/snapshots/*/adapter_model.safetensors",
)


def test_killed_runs_end_as_if_they_had_not_been(tmp_path):
    whole, killed = kill_everywhere(
        RUN, tmp_path, ("sft", "stage1", "stage2"), POINTS, patience=600, timeout=300
    )
    assert len(digests(whole, WEIGHTS)) == 5  # SFT, two stages, and a snapshot in each
    assert digests(killed, WEIGHTS) == digests(whole, WEIGHTS)
    assert not list(killed.rglob("checkpoints"))
