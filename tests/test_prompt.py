"""One prompt for the whole chain: what a policy was trained with is what every later step asks it."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import trees
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from peft import get_peft_model
from PIL import Image

from valor.cli import main
from valor.config import preset, prompt_texts
from valor.data.benchmarks import load_benchmark, rerender
from valor.data.pairs import erased_pairs
from valor.data.phantom import FEATURES, parse_report
from valor.data.studies import load_studies
from valor.policy.generate import merge, write_reports
from valor.policy.models import load_policy, load_processor, lora_config, save_policy
from valor.policy.prompt import Prompt, asked_by, context_text, conversations, prompt_of
from valor.policy.tiny import build_policy, generate
from valor.results.zeroshot import images_of, question_key
from valor.rewards.text import is_well_formed, report_body, scorer, thought_of
from valor.runs.makers import targets
from valor.runs.phases import PHASES, phase_key
from valor.testing import KINDS, miniature_policy
from valor.train.sft import sft
from valor.vocabulary import OBSERVATIONS

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


# ---- context ---------------------------------------------------------------------------------------


def table(folder, rows):
    "A CSV of `rows` with a film each."
    folder.mkdir(exist_ok=True, parents=True)
    FILMS[0].save(folder / "a.png")
    columns = sorted({column for row in rows for column in row} | {"image", "report"})
    lines = [",".join(columns)]
    for i, row in enumerate(rows):
        row = dict(image="a.png", report=f"the lungs are clear in study number {i}", study_id=i) | row
        lines.append(",".join(f'"{row.get(column, "")}"' for column in columns))
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return folder / "t.csv"


ROWS = [
    dict(study_id="s1", patient_id="p1", split="train", indication="Cough.", age="63", sex="female"),
    dict(study_id="s2", patient_id="p1", split="train", previous_id="s1", comparison="none."),
    dict(study_id="s3", patient_id="p2", split="test", indication="Pain"),
]


def told(tmp_path, rows, fields, **changes):
    root = table(tmp_path / "t", rows)
    changes = dict(unknown_view="guess", context=fields) | changes
    found = load_studies("table", root, cache=tmp_path / "c", **changes)
    return found, {r["study_id"]: r["context"] for part in found.values() for r in part}


def test_a_table_tells_what_it_has(tmp_path):
    fields = ["indication", "comparison", "age", "sex", "previous", "view"]
    _, known = told(tmp_path, ROWS, fields)
    empty = dict.fromkeys(fields) | dict(view="frontal")
    assert known["s1"] == empty | dict(indication="cough.", age="63", sex="female")
    before = "the lungs are clear in study number 0"
    assert known["s2"] == empty | dict(comparison="none.", previous=before)
    assert context_text(known["s3"], fields) == "Indication: pain. View: frontal."


def test_the_report_of_another_patient_is_never_told(tmp_path):
    rows = [*ROWS[:2], ROWS[2] | dict(previous_id="s1")]
    found, known = told(tmp_path, rows, ["previous"])
    assert set(known) == {"s1", "s2"}
    (line,) = found.set_aside.query("level == 'study'").itertuples()
    assert line.kind == "previous report of another patient" and "'p1', not of 'p2'" in line.message
    with pytest.raises(ValueError, match="study of patient 'p1', not of 'p2'"):
        told(tmp_path / "strict", rows, ["previous"], strict=True)
    assert set(told(tmp_path / "other", rows, ["indication"])[1]) == {"s1", "s2", "s3"}  # nobody asks for it


def test_a_field_that_nobody_states_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="table states no sex; it has indication"):
        told(tmp_path, [ROWS[0] | dict(sex="", age="")], ["indication", "sex"])
    with pytest.raises(ValueError, match="no field 'indicaton'; expected some of indication"):
        told(tmp_path, ROWS, ["indicaton"])
    with pytest.raises(ValueError, match=r"context=\['age'\]: benchmark='phantom' states no age"):
        preset("smoke", context=["age"])


def test_sources_in_their_distributors_layouts_tell_their_sections(tmp_path):
    for name, make, fields in (
        ("openi", trees.openi, ["indication"]),
        ("kaggle_indiana", trees.kaggle, ["indication"]),
        ("mimic_cxr_jpg", trees.mimic, ["indication", "view"]),
    ):
        root = make(tmp_path / name, 6)
        found = load_studies(name, root, cache=tmp_path / "c", context=fields, unknown_view="guess")
        row = found["train"][0]
        assert "cough" in row["context"]["indication"], name
        assert set(row["context"]) == set(fields)
        plain = load_studies(name, root, cache=tmp_path / "c", unknown_view="guess")
        assert "context" not in plain["train"].column_names
    assert row["context"]["view"] in ("pa", "ap")  # MIMIC states the position


def test_mimic_tells_the_patients_report_before(tmp_path):
    root = trees.mimic(tmp_path / "m", 6)
    table = pd.read_csv(root / "mimic-cxr-2.1.0-metadata.csv.gz", dtype=str)
    day = 21000000 + table["study_id"].astype(int) % 100
    table.assign(StudyDate=day, StudyTime="83000.0").to_csv(
        root / "mimic-cxr-2.1.0-metadata.csv.gz", index=False
    )
    found = load_studies("mimic_cxr_jpg", root, cache=tmp_path / "c", context=["previous"])
    rows = {r["study_id"]: r for part in found.values() for r in part}
    by_patient = {}
    for row in sorted(rows.values(), key=lambda r: r["study_id"]):
        by_patient.setdefault(row["patient_id"], []).append(row)
    first, second = next(rows for rows in by_patient.values() if len(rows) > 1)[:2]
    assert first["context"]["previous"] is None
    assert second["context"]["previous"].startswith(first["findings"])


def test_phantom_without_a_context_is_what_it_was():
    plain = load_benchmark("phantom", 6, 2, 4, size=64, omit=0.4)
    asked = load_benchmark("phantom", 6, 2, 4, size=64, omit=0.4, context=["indication"])
    assert set(plain["train"].column_names) == set(FEATURES)
    for split in plain:
        assert asked[split].remove_columns("context").to_list() == plain[split].to_list()
        assert all(row["indication"] for row in asked[split]["context"])
    fresh = rerender(asked["train"], 1)
    assert fresh["context"][:] == asked["train"]["context"][:]
    pairs = erased_pairs(asked["test"])
    assert pairs["context"][:] == [asked["test"][i]["context"] for i in pairs["row"]]
    one, same, other = (preset("smoke", **c) for c in ({}, dict(context=()), dict(context=["indication"])))
    assert {n: phase_key(n, one) for n in PHASES} == {n: phase_key(n, same) for n in PHASES}
    assert phase_key("data", one) != phase_key("data", other)
    listed = dataclasses.replace(other, context=("indication",))  # as JSON has it, or as Python writes it
    assert phase_key("data", listed) == phase_key("data", other)


def test_the_list_of_valor_generate_may_say_what_is_known(tmp_path, read, capsys):
    model, processor = load_policy(miniature_policy("qwen2_5_vl", tmp_path / "p"))
    processor.prompt = Prompt(("Report it.",), ("indication",))
    save_policy(model, processor, tmp_path / "told")
    for i in range(2):
        FILMS[i].save(tmp_path / f"{i}.png")
    lines = [
        dict(id="a", image=["0.png", "1.png"], indication="cough", age=63),
        dict(id="b", image="1.png"),
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = read(model, processor)
    out = ["--out", str(tmp_path / "out.jsonl"), "--max-new-tokens", "2"]
    main(["generate", "--model", str(tmp_path / "told"), "--images", str(tmp_path / "list.jsonl"), *out])
    assert "Indication: cough. Report it." in texts[0] and "Indication" not in texts[1]
    assert texts[0].count("vision_start") == 2 and texts[1].count("vision_start") == 1
    assert "states age, which" in capsys.readouterr().err
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(np.atleast_1d(line["image"])) for line in written] == [2, 1]


def test_hosted_models_are_told_the_same(tmp_path):
    rows = studies(context=[dict(indication="cough")] * 4)
    shown = images_of(rows[0])
    plain = images_of(studies()[0])
    assert shown.ask("Report.") == "Indication: cough. Report." and plain.ask("Report.") == "Report."
    settings = dict(model="m")
    assert question_key(settings, shown) != question_key(settings, plain)
    assert question_key(settings, plain) == question_key(settings, list(plain))  # as before


# ---- the order of the sections --------------------------------------------------------------------


def test_the_impression_may_stand_first(tmp_path):
    plain, turned = (
        load_benchmark("phantom", 6, 2, 4, size=64, sections=sections)
        for sections in ("both", "impression_first")
    )
    for one, other in zip(plain["train"], turned["train"]):
        assert other["report"] == f"impression: {one['impression']} findings: {one['findings']}"
        assert set(parse_report(other["report"])) == set(parse_report(one["report"]))
        assert {**one, "report": ""} == {**other, "report": ""}
    assert all(r.startswith("impression: ") for r in erased_pairs(turned["test"])["report"])
    root = trees.mimic(tmp_path / "m", 6)
    found = load_studies("mimic_cxr_jpg", root, cache=tmp_path / "c", sections="impression_first")
    row = found["train"][0]
    assert row["report"] == f"impression: {row['impression']} findings: {row['findings']}"
    assert preset("smoke", sections="impression_first").sections == "impression_first"


# ---- reasoning ------------------------------------------------------------------------------------

THOUGHT = "<think> a nodule on the left. </think> <report> findings: a nodule. </report>"


def test_the_format_reward_knows_the_thought_and_scorers_do_not():
    think, plain = scorer("format", reasoning="think"), scorer("format")
    texts = [THOUGHT, "<report> a nodule. </report>", "<think> a nodule <report> a. </report>", "<think> a"]
    assert think.score(texts) == [1.0, 0.0, 0.0, 0.0] and plain.score(texts) == [0.0, 1.0, 0.0, 0.0]
    reference = "<report> findings: a nodule. </report>"
    for name in ("bleu4", "rouge_l", "chexbert"):
        assert scorer(name).score([THOUGHT], [reference]) == scorer(name).score([reference], [reference])
    assert [report_body(text) for text in texts[2:]] == ["", ""]  # cut off in its thought: no report
    assert thought_of(THOUGHT) == "a nodule on the left."
    with pytest.raises(ValueError, match="reasoning='aloud'"):
        preset("smoke", reasoning="aloud")


def test_a_completion_that_never_closes_its_thought_is_refused(tmp_path):
    base = miniature_policy("llava", tmp_path / "p")
    data = conversations(studies(2), [THOUGHT, "<think> a nodule <report> a. </report>"])
    with pytest.raises(ValueError, match="completion 1: .* opens <think> and never closes it") as e:
        sft(base, data, tmp_path / "sft", "lora", lora_r=2)
    assert "\n" not in str(e.value) and not (tmp_path / "sft").exists()


def test_reasoning_reaches_what_is_trained_and_no_key_without_it():
    plain, think = preset("smoke"), preset("smoke", reasoning="think")
    same = {n for n in PHASES if phase_key(n, plain) == phase_key(n, think)}
    assert same == {"data", "expert", "controls"}
    data = load_benchmark("phantom", 8, 2, 2, size=64)["train"]
    assert targets(data) == [f"<report> {report} </report>" for report in data["report"]]
    for text, row in zip(targets(data, "think"), data):
        assert is_well_formed(text, "think") and report_body(text) == row["report"]
        named = [name.lower() for name, label in zip(OBSERVATIONS, row["labels"]) if label == 1]
        assert all(name in thought_of(text) for name in named if name != "no finding")
    assert prompt_of(think).reasoning == "think"
    tokenizer = build_policy(targets(data, "think"), image_size=32, width=32)[1].tokenizer
    ids = tokenizer(targets(data, "think")[0], add_special_tokens=False).input_ids
    written = tokenizer.decode(ids, skip_special_tokens=True)
    assert written == targets(data, "think")[0]  # nothing of the tags is lost


def test_files_of_valor_generate_judge_the_form_that_was_trained(tmp_path, monkeypatch):
    model, processor = load_policy(miniature_policy("llava", tmp_path / "p"))
    processor.prompt = Prompt(reasoning="think")
    FILMS[0].save(tmp_path / "a.png")
    monkeypatch.setattr("valor.policy.generate.generate", lambda *a, **k: [THOUGHT])
    write_reports(model, processor, [("a", tmp_path / "a.png")], tmp_path / "o.jsonl", 4)
    line = json.loads((tmp_path / "o.jsonl").read_text())
    assert line["well_formed"] is True and line["report"] == "findings: a nodule."
