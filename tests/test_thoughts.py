"""Policies that think before they report: a thought that is cut off is told in one line, and every table
judges the form that was asked for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from valor.config import preset
from valor.data.phantom import make_phantom
from valor.policy.generate import Film, write_reports
from valor.policy.tiny import build_policy, generate
from valor.runs import transfer

WELL = "<think> the heart is large. </think> <report> the heart is large. </report>"
OPEN = "<think> the heart is large. the heart"
ENDED = "<think> the heart is large."
LONG = "<report> the heart is large. the heart is large."


@pytest.fixture
def policy(monkeypatch):
    "A policy that writes the texts of `policy.said`, one after the other; OPEN and LONG are cut off."
    words = [f"<think> {WELL} {OPEN} {ENDED} {LONG}"]
    model, processor = build_policy(words, image_size=32, width=32)
    said = []

    def write(input_ids, max_new_tokens, **kw):
        rows = []
        for _ in range(len(input_ids)):
            text = said.pop(0)
            ids = processor.tokenizer(text, add_special_tokens=False).input_ids
            ids = ids + [ids[-1]] * (max_new_tokens - len(ids)) if text in (OPEN, LONG) else ids
            ids = ids[:max_new_tokens]
            ends = [processor.tokenizer.eos_token_id] if len(ids) < max_new_tokens else []
            pads = [processor.tokenizer.pad_token_id] * (max_new_tokens - len(ids) - len(ends))
            rows.append(ids + ends + pads)
        return torch.cat([input_ids, torch.tensor(rows)], 1)

    monkeypatch.setattr(model, "generate", write)
    return SimpleNamespace(model=model, processor=processor, said=said)


def film():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8))


def test_a_thought_that_is_cut_off_is_told_in_one_line_with_the_count(policy, capsys):
    policy.said += [OPEN, WELL, ENDED, OPEN, LONG]
    written = generate(policy.model, policy.processor, [film()] * 5, 30, batch_size=2, desc="SFT")
    assert len(written) == 5
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if "cut off" in line]
    assert line == (
        "SFT: 2 of 5 completions were cut off inside the thought (max_new_tokens=30 reached before "
        "</think>) and hold no report; raise max_new_tokens"
    )
    policy.said += [WELL, ENDED, LONG]  # the model itself ended the thought, or a report is cut off
    generate(policy.model, policy.processor, [film()] * 3, 30)
    assert "cut off" not in capsys.readouterr().err


def test_valor_generate_says_it_once_for_all_batches(policy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("valor.expert.frozen.weights_digest", lambda model: "w")
    films = []
    for i in range(5):
        film().save(tmp_path / f"{i}.png")
        films.append(Film(str(i), tmp_path / f"{i}.png"))
    policy.said += [OPEN, WELL, OPEN, WELL, OPEN]
    out = tmp_path / "out.jsonl"
    write_reports(policy.model, policy.processor, films, out, max_new_tokens=30, batch_size=2, size=32)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cut off" in line]
    assert line.startswith(f"{out}: 3 of 5 completions were cut off inside the thought")


@pytest.mark.parametrize("reasoning, formed", [("think", [1, 0, 0]), ("none", [0, 1, 0])])
def test_evaluate_on_judges_the_form_that_was_asked_for(reasoning, formed, tmp_path, monkeypatch):
    test = make_phantom(3, 0, "test", size=64)
    written = [WELL, "<report> the heart is large. </report>", OPEN]
    monkeypatch.setattr(transfer, "written_abroad", lambda *a: dict(test=written))
    monkeypatch.setattr(transfer, "ensure", lambda name, cfg: tmp_path)
    monkeypatch.setattr(transfer, "load_data", lambda folder: dict(test=test, train=test))
    cfg = preset("smoke", reasoning=reasoning)
    transfer.write_transfer(tmp_path, "SFT", cfg, preset("smoke"))
    assert transfer.read_frame(tmp_path, "test").well_formed.tolist() == formed


def test_only_a_thinking_policy_is_judged_anew():
    "Finished rows of other policies on other data are used again."
    plain, thinks = preset("smoke"), preset("smoke", reasoning="think")
    target = preset("smoke", benchmark="openi_rendered")
    assert transfer.transfer_config("SFT", thinks, target)["fields"]["reasoning"] == "think"
    wanted = ["max_new_tokens", "eval_batch_size", "chexbert", "chexbert_uncertain"]
    assert list(transfer.transfer_config("SFT", plain, target)["fields"]) == wanted
