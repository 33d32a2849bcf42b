"""A miniature of LLaVA-Med and one of Qwen2.5-VL go the whole way with context, two views and reasoning:
SFT, both stages, evaluation, `valor generate` and `valor serve`."""

import base64
import json
import urllib.request

import numpy as np
import pytest
from PIL import Image

from valor.cli import main
from valor.config import preset
from valor.data.views import drawn_film
from valor.policy.convert import convert_llava_med
from valor.policy.models import load_policy
from valor.policy.prompt import asked_by
from valor.policy.server import PolicyServer
from valor.rewards.text import report_body
from valor.runs.phases import ensure, phase_folder
from valor.testing import miniature_llava_med, miniature_policy

WORDS = ("the heart is enlarged.", "there is a left pleural effusion.", "the lungs are clear.")


def studies(folder):
    "A table of eleven studies with a frontal and a lateral film; every other one states an indication."
    folder.mkdir()
    lines = []
    for i in range(11):
        for view in ("frontal", "lateral"):
            Image.fromarray(drawn_film(view, seed=2 * i + (view == "lateral"))).save(
                folder / f"{i}{view}.png"
            )
        row = dict(study_id=f"s{i}", patient_id=f"p{i}", image=[f"{i}frontal.png", f"{i}lateral.png"])
        row |= dict(findings=f"{WORDS[i % 3]} study {i} of them.", impression=WORDS[(i + 1) % 3])
        row |= dict(view=["PA", "LATERAL"], split="test" if i > 7 else "train")
        lines.append(json.dumps(row | (dict(indication="Cough.") if i % 2 else {})))
    (folder / "t.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "t.jsonl"


def base(kind, folder):
    if kind != "llava_med":
        return miniature_policy(kind, folder / "base")
    convert_llava_med(miniature_llava_med(folder / "original"), folder / "base")
    return folder / "base"


def configured(kind, folder):
    "The smallest run that has every part."
    small = dict(group_size=2, batch_size=2, max_new_tokens=8, lora_r=2, lora_alpha=4, k_clin=2)
    small |= dict(stage1_steps=2, stage2_steps=1, eval_steps=None, expert_steps=1, n_boot=10, threads=1)
    data = dict(benchmark="table", data_root=str(studies(folder / "data")), data_options=dict(view="both"))
    asked = dict(prompt="See <image> and report.", context=["indication", "view"], reasoning="think")
    policy = dict(base=str(base(kind, folder)), sft_mode="lora", sft_batch_size=4, sft_epochs=1)
    given = data | asked | policy | dict(expert="embedded-labels", sections="impression_first")
    return preset("smoke", **small, **given)


@pytest.mark.parametrize("kind", ["llava_med", "qwen2_5_vl"])
def test_the_whole_way_with_context_two_views_and_reasoning(kind, tmp_path, monkeypatch, capsys):
    for name in ("VALOR_RUNS", "VALOR_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    cfg = configured(kind, tmp_path)
    texts = []
    model, processor = load_policy(cfg.base)
    kind_of, forward = type(model.base_model), type(model.base_model).forward

    def reading(self, input_ids=None, **kw):
        if input_ids is not None and input_ids.shape[1] > 1:
            texts.extend(processor.batch_decode(input_ids))
        return forward(self, input_ids=input_ids, **kw)

    monkeypatch.setattr(kind_of, "forward", reading)
    folder = ensure("eval_stage2", cfg)
    for text in texts:  # SFT, rollouts and evaluation asked the same
        assert "View: pa and lateral. See" in text and "Describe" not in text, text
    assert any("Indication: cough. View" in text for text in texts)
    assert any("<think>" in text and "impression: " in text for text in texts)  # what SFT taught
    assert (folder / "frame test.csv").exists() and (folder / "frame blank image.csv").exists()

    merged, sft = tmp_path / "merged", phase_folder("sft", cfg) / "policy"
    adapter = phase_folder("stage2", cfg) / "adapter"
    main(["merge", "--base", str(sft), "--adapter", str(adapter), "--out", str(merged)])
    out = ["--out", str(tmp_path / "out.jsonl"), "--max-new-tokens", "4"]
    texts.clear()
    main(["generate", "--model", str(merged), "--images", cfg.data_root, *out])
    assert len(texts) == 11 and all("and report." in text for text in texts)
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert len(line["image"]) == 2 and line["report"] == report_body(line["completion"])

    model, processor = load_policy(merged)
    assert asked_by(processor).reasoning == "think" and asked_by(processor).context == ("indication", "view")
    films = [tmp_path / "data" / f"0{view}.png" for view in ("frontal", "lateral")]
    urls = ["data:image/png;base64," + base64.b64encode(film.read_bytes()).decode() for film in films]
    content = [dict(type="image_url", image_url=dict(url=url)) for url in urls]
    texts.clear()
    with PolicyServer(model, processor, "mini") as server:
        body = dict(model=server.id, messages=[dict(role="user", content=content)], max_tokens=3)
        sent = json.dumps(body | dict(context=dict(indication="fever"))).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{server.url}/chat/completions", sent, headers)):
            pass
    assert "Indication: fever. See" in texts[0] and np.all(["Describe" not in text for text in texts])
