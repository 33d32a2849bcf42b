"""DPO and MMedPO as phases: loss as TRL's, bad preference files named, a killed run ends as if it had not
been."""

import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch
from kills import digests, kill_everywhere

from valor.config import preset
from valor.train.preference import read_preferences, weighted_dpo_loss

SMALL = dict(
    threads=1,
    n_train=24,
    n_test=8,
    n_val=2,
    base_studies=16,
    sft_epochs=1,
    stage1_steps=2,
    stage2_steps=4,
    batch_size=4,
    max_new_tokens=16,
    save_steps=2,
    expert_steps=1,
)
RUN = f"""
from valor.config import preset
from valor.runs.phases import ensure
for phase in ("dpo", "mmedpo"): ensure(phase, preset("smoke", **{SMALL}))
"""
POINTS = ["samples-*/samples.jsonl", "mmedpo-*/checkpoints/checkpoint-2/trainer_state.json"]


MADE = (
    "samples-*/samples.jsonl",
    "*dpo-*/adapter/adapter_model.safetensors",
    "*dpo-*/pairs.json",
    "mmedpo-*/adapter/adapter_model.safetensors",
)


def test_killed_runs_end_as_if_they_had_not_been(tmp_path):
    whole, killed = kill_everywhere(
        RUN, tmp_path, ("samples", "dpo", "mmedpo"), POINTS, patience=1800, timeout=900, ready=os.path.getsize
    )  # samples.jsonl begins empty
    assert digests(killed, MADE) == digests(whole, MADE) and len(digests(whole, MADE)) == 5, digests(
        whole, MADE
    )
    assert not list(killed.rglob("checkpoints"))
    updates = {
        p.parent.name.split("-")[0]: len(p.read_text().splitlines()) - 1
        for p in killed.glob("*dpo-*/log.csv")
    }
    updates |= {
        p.parent.name.split("-")[0]: len(p.read_text().splitlines()) - 1
        for p in killed.glob("mmedpo-*/log.csv")
    }
    assert updates == dict(dpo=6, mmedpo=6)  # as many as both stages of VALOR have
    pairs = json.loads(next(killed.glob("mmedpo-*/pairs.json")).read_text())
    assert (
        any(p["noised"] for p in pairs)
        and any(not p["noised"] for p in pairs)
        and all(0 < p["weight"] <= 1 for p in pairs)
    )


def test_the_loss_by_hand():
    lp = torch.tensor([-2.0, -5.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss, _ = weighted_dpo_loss(
        lp,
        torch.tensor([-3.0, -3.0, -3.0]),
        torch.tensor([-2.5, -5.0, -1.0]),
        torch.tensor([-2.0, -3.0, -4.0]),
        torch.tensor([1.0, 0.5, 0.0]),
        beta=0.1,
    )
    margins = [0.5 + 1, 0, 0 - 1]  # (−2 + 2.5) − (−3 + 2), …
    assert loss.item() == pytest.approx(
        sum(w * math.log(1 + math.exp(-0.1 * m)) for w, m in zip([1, 0.5, 0], margins)) / 3, abs=1e-9
    )
    (gradient,) = torch.autograd.grad(loss, lp)
    assert gradient.tolist() == pytest.approx(
        [-0.1 / 3 * w / (1 + math.exp(0.1 * m)) for w, m in zip([1, 0.5, 0], margins)], abs=1e-9
    )


def says(text):
    return [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": text}]


GOOD = dict(
    id="s1",
    image="x.jpg",
    conversations=says("Clear lungs."),
    rejected_conversations=says("Large effusion."),
    weighted_score=0.8,
)
BAD = [
    (lambda g: g | dict(weighted_score="high"), "row 2: weighted_score is 'high', not a number in [0, 1]"),
    (lambda g: g | dict(weighted_score=-0.1), "row 2: weighted_score is -0.1"),
    (
        lambda g: {k: v for k, v in g.items() if k != "rejected_conversations"},
        "row 2: rejected_conversations is not one question",
    ),
    (lambda g: ["a"], "row 2: is a list, not an object"),
    (
        lambda g: g | dict(id=7, image="missing.png"),
        "row 2: id 7 is no training study and image 'missing.png' no file",
    ),
    (lambda g: g | dict(conversations=says(" ")), "row 2: conversations is not"),
    (
        lambda g: g | dict(conversations=says("a")[::-1]),
        "row 2: conversations is not one question from 'human'",
    ),
]


@pytest.mark.parametrize("change,message", BAD)
@pytest.mark.parametrize("lines", [False, True])
def test_bad_rows_are_named(change, message, lines, tmp_path):
    rows = [GOOD, change(GOOD), GOOD]
    path = tmp_path / "pairs.json"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    with pytest.raises(ValueError) as e:
        read_preferences(path, ["s0", "s1"])
    assert message in str(e.value) and "1 of 3 rows are bad" in str(e.value) and str(path) in str(e.value)


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_pairs_of_equal_reports_are_set_aside_and_counted(lines, packed, tmp_path, capsys):
    rows = [GOOD] * 4914 + [
        GOOD | dict(rejected_conversations=GOOD["conversations"])
    ] * 5  # as in MMedPO's slake file
    path = tmp_path / "pairs.json"
    data = b"\xef\xbb\xbf" + ("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    assert len(read_preferences(path, ["s0", "s1"])) == 4914
    assert (
        "pairs.json: 5 of 4,919 pairs set aside: chosen and rejected report are the same"
        in capsys.readouterr().out
    )
    path.write_text(json.dumps(rows[-2:]))
    with pytest.raises(ValueError, match="holds no pairs but of equal reports"):
        read_preferences(path, [])


@pytest.mark.skipif("VALOR_REAL" not in os.environ, reason="VALOR_REAL, a folder with iu_xray/, is not set")
def test_the_released_pairs_of_mmedpo_are_read():
    path = Path(os.environ["VALOR_REAL"]) / "iu_xray" / "mmedpo_pairs.json"
    ids = [row["id"] for row in json.loads(path.read_bytes())]
    assert len(read_preferences(path, ids)) > 0.99 * len(ids)


@pytest.mark.parametrize(
    "text,message",
    [
        ("[{", "not JSON"),
        ("[" * 200_000, "nested too deep"),
        ('[{"id": "\\ud83d"}]', "half a surrogate pair"),
        ('{"id": 1', "not JSON"),
        ("", "holds no pairs"),
        ("[]", "holds no pairs"),
    ],
)
def test_files_that_are_no_preference_files(text, message, tmp_path):
    (tmp_path / "pairs.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_preferences(tmp_path / "pairs.json", [])


def test_wrong_parameters_are_refused_before_anything_runs(tmp_path):
    for change, message in (
        (dict(dpo_pairs=str(tmp_path / "no.json")), "'samples' or a preference file that exists"),
        (dict(mmedpo_noise="blur"), "mmedpo_noise='blur'"),
        (dict(mmedpo_scorer="gpt"), "mmedpo_scorer='gpt'"),
        (dict(dpo_beta=0), "dpo_beta=0"),
        (
            dict(benchmark="table", data_root="x.csv", mmedpo_noise="lesions"),
            "nobody stated where the lesions",
        ),
    ):
        with pytest.raises(ValueError) as e:
            preset("smoke", **change)
        assert message in str(e.value)
    assert (
        preset("smoke", benchmark="table", data_root="x.csv").mmedpo_noise == "diffusion"
    )  # chosen by name, not behind one's back


def test_a_preference_file_replaces_the_samples(tmp_path, monkeypatch):
    from valor.runs.phases import ensure, load_data, phase_folder

    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    cfg = preset("smoke", **SMALL | dict(stage1_steps=1, stage2_steps=1))
    study = load_data(ensure("data", cfg))["train"][3]["study_id"]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(GOOD | dict(id=study)))
    given = preset(
        "smoke", **SMALL | dict(stage1_steps=1, stage2_steps=1), dpo_pairs=str(tmp_path / "pairs.jsonl")
    )
    for phase, weight in (("dpo", 1.0), ("mmedpo", 0.8)):
        (pair,) = json.loads((ensure(phase, given) / "pairs.json").read_text())
        assert (pair["row"], pair["weight"], pair["rejected"]) == (
            3,
            weight,
            "<report> Large effusion. </report>",
        )
    assert not (phase_folder("samples", given) / "samples.jsonl").exists()
