"""One prompt for the whole chain: what a policy was trained with is what every later step asks it."""

import dataclasses
import json

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from peft import get_peft_model
from PIL import Image

from valor.config import preset, prompt_texts
from valor.policy.generate import merge, write_reports
from valor.policy.models import load_policy, load_processor, lora_config, save_policy
from valor.policy.prompt import Prompt, asked_by, conversations, prompt_of
from valor.policy.tiny import build_policy, generate
from valor.runs.phases import PHASES, phase_key
from valor.testing import KINDS, miniature_policy
from valor.train.sft import sft

REPORT = "<report> findings: no effusion. impression: clear. </report>"
RNG = np.random.default_rng(0)
FILMS = [Image.fromarray(RNG.integers(0, 255, (56, 56), dtype=np.uint8)) for _ in range(4)]


def studies(n=4, **columns):
    features = dict(image=ImageColumn(), report=Value("string"))
    plain = Dataset.from_dict(dict(image=FILMS[:n], report=[REPORT] * n), features=Features(features))
    for name, values in columns.items():
        plain = plain.add_column(name, values)
    return plain


@pytest.fixture
def read(monkeypatch):
    """`read(model, processor)`: a list that fills with every text that models of this class read."""

    def spy(model, processor):
        texts, kind = [], type(model.base_model)  # the model without its head
        forward = kind.forward

        def reading(self, input_ids=None, **kw):
            if input_ids is not None and input_ids.shape[1] > 1:
                texts.extend(processor.batch_decode(input_ids))
            return forward(self, input_ids=input_ids, **kw)

        monkeypatch.setattr(kind, "forward", reading)
        return texts

    return spy


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_what_was_trained_is_what_is_asked(kind, tmp_path, read):
    base = miniature_policy(kind, tmp_path / "base")
    prompt = Prompt(("See <image> and report it.", "Write <image> up."))
    texts = read(*load_policy(base))
    data = conversations(studies(), [REPORT] * 4, prompt, seed=0)
    sft(base, data, tmp_path / "sft", "lora", prompt=prompt, batch_size=2, lora_r=2)
    assert "report it." in " ".join(texts) and "up." in " ".join(texts)  # both were drawn
    model, processor = load_policy(tmp_path / "sft")
    assert asked_by(processor) == prompt
    FILMS[0].save(tmp_path / "film.png")
    for ask in (
        lambda: generate(model, processor, FILMS[:1], 2),
        lambda: write_reports(model, processor, [("a", tmp_path / "film.png")], tmp_path / "a.jsonl", 2),
    ):
        texts.clear()
        ask()
        assert "report it." in texts[0] and "Describe" not in texts[0]
    adapted = get_peft_model(model, lora_config(model, "language", 2, 4))
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "sft", tmp_path / "adapter", tmp_path / "merged")
    assert asked_by(load_processor(tmp_path / "merged")) == prompt  # it goes along


class Length:
    "A reward that needs no model: the number of characters."

    def score(self, candidates, references):
        return [float(len(c)) for c in candidates]


@pytest.mark.parametrize("rollout", ["merged", "transformers"])
def test_stages_ask_what_sft_asked(rollout, tmp_path, read):
    from valor.rewards.compose import CLINICAL_SCORERS, TEXT_SCORERS
    from valor.train.grpo import Rewards, Stage, make_trainer

    prompt = Prompt(("See <image> and report it.", "Write <image> up."))
    model, processor = load_policy(miniature_policy("qwen2_5_vl", tmp_path / "base"))
    processor.prompt = prompt
    save_policy(model, processor, tmp_path / "sft")
    texts = read(model, processor)
    settings = dict(group_size=2, batch_size=2, max_new_tokens=4, lora_r=2, k_clin=None)
    cfg = preset("smoke", rollout=rollout, **settings)
    rewards = Rewards({n: Length() for n in (*TEXT_SCORERS, *CLINICAL_SCORERS, "format")}, None)
    stage = Stage("language", 0.0, steps=3, seed=1)
    trainer = make_trainer(tmp_path / "sft", studies(), tmp_path / "t", rewards, cfg, stage)
    trainer.train()
    said = " ".join(texts)
    assert "report it." in said and "up." in said and "Describe" not in said
    assert len(trainer.train_dataset) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_from_elsewhere_is_asked_the_default(kind, tmp_path):
    assert asked_by(load_processor(miniature_policy(kind, tmp_path / "p"))) == Prompt()
    model, processor = load_policy(tmp_path / "p")
    save_policy(model, processor, tmp_path / "saved")
    assert not (tmp_path / "saved" / "valor.json").exists()  # as before there was a choice


def test_the_default_prompt_changes_no_key_and_another_reaches_the_base(tmp_path):
    plain = preset("smoke")
    same = dataclasses.replace(plain, prompt="Describe this chest X-ray.")
    other = dataclasses.replace(plain, prompt="What is there?")
    assert {n: phase_key(n, plain) for n in PHASES} == {n: phase_key(n, same) for n in PHASES}
    changed = {n for n in PHASES if phase_key(n, plain) != phase_key(n, other)}
    assert set(PHASES) - changed == {"data", "expert", "controls"}
    file = tmp_path / "prompts.txt"
    file.write_text("Describe it.\nReport on it.\n")
    several = dataclasses.replace(plain, prompt=str(file))
    assert prompt_of(several).texts == ("Describe it.", "Report on it.")
    before = phase_key("sft", several)
    file.write_text("Describe it.\nReport it.\n")
    from valor.contents import fingerprint_once

    fingerprint_once.cache_clear()
    assert phase_key("sft", several) != before  # what the file holds counts


@pytest.mark.parametrize(
    "lines, said",
    [
        ("<image> One.\nTwo.\n", "line 2, 'Two.': has no place for the image"),
        ("<image> One. <image>\n", "line 1, '<image> One. <image>': a place occurs twice"),
        ("\n \n", "holds no text"),
        ("<image>\n", "has no text"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_refused_in_one_line(lines, said, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(lines)
    with pytest.raises(ValueError) as e:
        preset("smoke", prompt=str(file))
    assert said in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no such file"):
        prompt_texts(str(tmp_path / "absent.txt"))


def test_every_word_of_the_prompt_is_in_the_embedded_vocabulary():
    prompt = Prompt(("What pathology, please?",), ("indication",))
    tokenizer = build_policy([REPORT], image_size=32, width=32, prompt=prompt)[1].tokenizer
    ids = tokenizer(" What pathology, please? Indication:", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids


def test_rows_of_a_preference_pair_hold_the_question(tmp_path):
    from valor.train.preference import pair, pair_dataset

    pairs = [pair(0, "a", "b", prompt="See <image> now."), pair(1, "a", "b")]
    rows = pair_dataset(pairs, studies(truth=[[]] * 4))
    kinds = [[p["type"] for p in rows[0]["prompt"][0]["content"]], type(rows[1]["prompt"][0]["content"])]
    assert kinds == [["text", "image", "text"], str]
    assert json.loads(json.dumps(pairs))[1]["prompt"] == "Describe this chest X-ray."
