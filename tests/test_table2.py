"""The rows of Table 2 that run by somebody else's code, on made-up weights in the true format: MAIRA-2."""

import inspect
import json
import shutil

import maira2_weights
import pytest
import torch
from datasets import Dataset
from PIL import ImageOps

from valor.data.phantom import make_phantom
from valor.results.zeroshot import ROWS, Shown, load_row, maira2_report, plain_findings, run_row

NAME = "MAIRA-2"
# of the release's processing_maira2.py: what must be given, and what may be
NEEDED = ["current_frontal", "current_lateral", "prior_frontal"]
NEEDED += ["indication", "technique", "comparison", "prior_report"]
OPTIONAL = {"get_grounding": False, "assistant_text": None}


@pytest.fixture(scope="module")
def studies():
    data = make_phantom(3, 5, "test")
    views = list(data["image"])
    columns = dict(
        study_id=list(data["study_id"]), image=views, second_image=[ImageOps.mirror(v) for v in views]
    )
    return Dataset.from_dict(columns)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maira")
    with pytest.MonkeyPatch.context() as m:  # copies of the weights' code go there
        m.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        yield maira2_weights.make(folder / "maira-2")


@pytest.fixture(scope="module")
def loaded(weights):
    return load_row(ROWS[NAME], NAME, weights, [NAME])


@torch.inference_mode()
def as_on_the_card(model, processor, frontal, lateral, known, tokens):
    "Findings without places, by the calls that the card of microsoft/maira-2 shows."
    inputs = processor.format_and_preprocess_reporting_input(
        current_frontal=frontal,
        current_lateral=lateral,
        prior_frontal=None,
        indication=known.get("indication"),
        technique=None,
        comparison=known.get("comparison"),
        prior_report=None,
        return_tensors="pt",
        get_grounding=False,
    )
    inputs = inputs.to(model.device)
    output = model.generate(**inputs, max_new_tokens=tokens, use_cache=True)
    text = processor.decode(output[0][inputs["input_ids"].shape[-1] :], skip_special_tokens=True).lstrip()
    return processor.convert_output_to_plaintext_or_grounded_sequence(text)


def test_the_double_has_the_documented_signature(loaded):
    found = inspect.signature(loaded[1].format_and_preprocess_reporting_input).parameters
    named = [p for p in found.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in named if p.default is p.empty] == NEEDED
    assert {p.name: p.default for p in named if p.default is not p.empty} == OPTIONAL


def test_maira_2_is_asked_as_its_card_says(loaded, studies):
    model, processor = loaded
    assert type(model).__module__.endswith("modeling_maira2")
    assert type(processor).__module__.endswith("processing_maira2")
    texts = set()
    for known in ({}, {"indication": "cough and fever", "comparison": "prior"}):
        for row in studies:
            both = Shown([row["image"], row["second_image"]])
            both.known = known
            said, finish = maira2_report(model, processor, both, "not used", 12)
            asked = processor.calls[-1]
            assert said == as_on_the_card(model, processor, *both, known, 12) and finish in ("length", "stop")
            assert [i.tobytes() for i in asked["images"]] == [processor.stretched(i).tobytes() for i in both]
            assert (
                asked["text"].count("<image>") == 2
                and f"INDICATION: {known.get('indication', 'N/A')}" in asked["text"]
            )
            assert "TECHNIQUE: N/A" in asked["text"] and "grounded" not in asked["text"]
            alone, _ = maira2_report(model, processor, both[:1], "", 12)
            swapped, _ = maira2_report(model, processor, both[::-1], "", 12)
            assert len({said, alone, swapped}) == 3  # both views are seen, each in its place
            texts |= {said}
    assert len(texts) == 6


@pytest.mark.parametrize("change", ["unknown", "missing", "renamed"])
def test_a_call_with_other_arguments_fails(loaded, studies, change, monkeypatch):
    model, processor = loaded
    true = processor.format_and_preprocess_reporting_input

    def other(**arguments):
        if change == "unknown":
            arguments["max_length"] = 10
        else:
            lateral = arguments.pop("current_lateral")
            arguments |= {"lateral": lateral} if change == "renamed" else {}
        return true(**arguments)

    monkeypatch.setattr(processor, "format_and_preprocess_reporting_input", other)
    with pytest.raises(TypeError):
        maira2_report(model, processor, [studies[0]["image"]], "", 4)


def test_places_that_nobody_asked_for_are_taken_out(loaded):
    processor = loaded[1]
    two = "<obj>small effusion<box><x10><y20><x30><y40></box></obj><obj>clear lungs .</obj>"
    assert processor.convert_output_to_plaintext_or_grounded_sequence(two) == [
        ("small effusion", [(0.105, 0.205, 0.305, 0.405)]),
        ("clear lungs .", None),
    ]
    assert plain_findings(processor, two) == "small effusion clear lungs ."
    assert (
        plain_findings(processor, "clear . <obj>small effusion<box><x10>").split()
        == "clear . small effusion".split()
    )


def test_the_row_runs_and_goes_on_where_it_stopped(weights, studies, tmp_path):
    given = dict(weights={NAME: str(weights)}, trust_remote_code=[NAME])
    found = run_row(NAME, studies, tmp_path, "phantom", **given)
    assert found.reports is not None, found.note
    assert list(found.reports["id"]) == list(studies["study_id"]) and all(found.reports.status == "ok")
    lines = (tmp_path / "maira-2.jsonl").read_text()
    again = run_row(NAME, studies, tmp_path, "phantom", **given)
    assert list(again.reports.candidate) == list(found.reports.candidate)
    assert (tmp_path / "maira-2.jsonl").read_text() == lines


def test_its_code_runs_only_by_name(weights, studies, tmp_path):
    note = run_row(NAME, studies, tmp_path, "phantom", weights={NAME: str(weights)}).note
    assert "trust_remote_code=['MAIRA-2']" in note and "\n" not in note
    assert not list(tmp_path.iterdir())


def test_code_for_an_older_transformers_is_one_line(weights, studies, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(weights, old)
    shutil.copy(maira2_weights.CODE / "released_layout.py", old)
    config = json.loads((old / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "released_layout.Maira2ForConditionalGeneration"
    (old / "config.json").write_text(json.dumps(config))
    given = dict(weights={NAME: str(old)}, trust_remote_code=[NAME])
    note = run_row(NAME, studies, tmp_path / "answers", "phantom", **given).note
    assert "its code does not fit transformers" in note and "4.46 to 4.51" in note and "\n" not in note
