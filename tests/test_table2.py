"""The rows of Table 2 that run by somebody else's code, on made-up weights in the true format.

MAIRA-2 by the code beside its weights; Med-Flamingo by open-flamingo in the Python of `make flamingo`."""

import base64
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import maira2_weights
import pytest
import torch
from datasets import Dataset
from PIL import ImageOps

from valor.data.phantom import make_phantom
from valor.results.flamingo import (
    FlamingoWeights,
    MedFlamingo,
    flamingo_prompt,
    flamingo_python,
    flamingo_report,
)
from valor.results.flamingo_worker import answer_in
from valor.results.zeroshot import (
    ROWS,
    Shown,
    load_row,
    maira2_report,
    plain_findings,
    run_flamingo,
    run_row,
)

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


FLAMINGO = "Med-Flamingo"
try:
    PYTHON, why = flamingo_python(), ""
except ValueError as e:
    PYTHON, why = None, str(e)
real = pytest.mark.skipif(PYTHON is None, reason=why)
SCRIPT = Path(__file__).with_name("flamingo_weights.py")
TOKENS = 24  # as in SCRIPT


def outside(*arguments, **options):
    "The last line that the weights' script prints in the other Python, as JSON."
    done = subprocess.run(
        [PYTHON, "-I", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def given_in(folder, **changes):
    files = dict(llama="llama-7b-hf", checkpoint="model.pt", clip="ViT-L-14.pt")
    return {key: str(folder / name) for key, name in files.items()} | changes


@pytest.fixture(scope="module")
def flamingo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flamingo")
    keys = outside("make", folder)
    assert {"perceiver.latents", "lang_encoder.model.embed_tokens.weight"} < set(keys)
    assert "lang_encoder.gated_cross_attn_layers.3.attn.to_q.weight" in keys
    assert not any("vision_encoder" in key or "lm_head" in key for key in keys)
    return folder


@real
def test_med_flamingo_writes_what_the_package_called_as_in_its_demo_writes(
    flamingo_folder, studies, tmp_path, monkeypatch
):
    row, shots, asked = ROWS[FLAMINGO], tmp_path / "shots.jsonl", []
    shots.write_text(json.dumps(dict(image="0.png", report="the lungs are clear .")))
    for i, study in enumerate(studies):
        views = [tmp_path / f"{i}.png", tmp_path / f"{i}_lateral.png"]
        study["image"].save(views[0])
        study["second_image"].save(views[1])
        led = flamingo_prompt(row.prompt, 2, [(1, "the lungs are clear .")])
        asked += [(flamingo_prompt(row.prompt, 2), views), (led, [tmp_path / "0.png", *views])]
    request = json.dumps([[prompt, [str(path) for path in paths]] for prompt, paths in asked])
    direct = outside("direct", flamingo_folder, input=request)

    given, path = given_in(flamingo_folder), tmp_path / "answers.jsonl"
    frame = run_flamingo(row, FLAMINGO, given, studies, path, TOKENS)
    with MedFlamingo(FlamingoWeights(**given, shots=str(shots)), TOKENS) as flamingo:
        views = [
            [base64.b64encode(path.read_bytes()).decode() for path in paths[1:]] for _, paths in asked[1::2]
        ]
        led = [flamingo_report(flamingo, images, row.prompt)[0] for images in views]
        assert flamingo.versions["open-flamingo"] == "0.0.2"
        with pytest.raises(RuntimeError, match="5 <image> in the prompt for 3 images"):
            flamingo_report(flamingo, views[0], "<image>?")
    for reports, texts in ((list(frame.candidate), direct[::2]), (led, direct[1::2])):
        assert reports == [answer_in(text)[0] for text in texts]
        assert all(reports)

    monkeypatch.setattr(MedFlamingo, "start", lambda self: pytest.fail("loaded again"))
    again = run_flamingo(row, FLAMINGO, given, studies, path, TOKENS)
    assert list(again.candidate) == list(frame.candidate)


@real
def test_weights_that_do_not_fit_are_one_line(flamingo_folder, studies, tmp_path):
    state = torch.load(flamingo_folder / "model.pt", weights_only=True)
    gate = {key: value for key, value in state.items() if "7." not in key or "attn_gate" not in key}
    embeddings = "lang_encoder.model.embed_tokens.weight"
    odd = {
        "gate": (gate, "1 of 92 trained weights are not in it, such as lang_encoder.model.layers.7.gated"),
        "other": (
            state | {embeddings: torch.zeros(32003, 8)},
            f"{embeddings} has the shape (32003, 8), the model",
        ),
        "more": (state | {"lora": torch.zeros(1)}, "1 weights have no place in the model, such as lora"),
        "code": (dict(run=Path), "no file of weights alone"),  # a pickle that names a function
    }
    for name, (weights, _) in odd.items():
        torch.save(weights, tmp_path / name)
    files = [
        flamingo_folder / "model.pt",
        flamingo_folder / "ViT-L-14.pt",
        *(tmp_path / name for name in odd),
    ]
    loaded, *said = outside("refuse", flamingo_folder, *files)
    assert loaded == "loaded"
    for line, path, says in zip(
        said, files[1:], ["no file of weights alone", *(says for _, says in odd.values())]
    ):
        assert line.startswith(f"checkpoint='{path}': {says}") and "\n" not in line

    given = given_in(flamingo_folder, checkpoint=str(tmp_path / "gate"))
    note = run_row(FLAMINGO, studies, tmp_path / "answers", "phantom", weights={FLAMINGO: given}).note
    assert note.startswith("Med-Flamingo: the worker could not load. ") and odd["gate"][1] in note


@pytest.mark.parametrize(
    "given, says",
    [
        ("/models/med-flamingo", "expected {llama: FOLDER, checkpoint: model.pt"),
        (dict(llama="/no/llama", checkpoint="/no/model.pt"), "llama='/no/llama': there is no such folder"),
        (dict(llama="a/b", checkpoint="/no/model.pt", lora="x"), "unknown are lora"),
    ],
)
def test_what_is_not_given_is_named(studies, tmp_path, given, says):
    note = run_row(FLAMINGO, studies, tmp_path, "phantom", weights={FLAMINGO: given}).note
    assert says in note and "\n" not in note


def test_no_environment_and_no_weights_are_named(studies, tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_FLAMINGO", sys.executable)
    with pytest.raises(ValueError, match="`make flamingo`"):
        MedFlamingo(FlamingoWeights("llama", "model.pt"))
    assert run_row(FLAMINGO, studies, tmp_path, "phantom").note == "its weights are not given"


@pytest.mark.parametrize(
    "says", ['{"ready": false, "error": "no\\nmemory"}', '{"ready": true}\nout of it', None]
)
def test_a_child_that_fails_is_one_line_and_is_left(tmp_path, monkeypatch, says):
    monkeypatch.setattr("valor.results.flamingo.flamingo_python", lambda python: sys.executable)
    flamingo = MedFlamingo(FlamingoWeights(str(tmp_path), str(tmp_path / "m"), timeout=60))
    flamingo.command = [sys.executable, "-c", f"print({says!r})" if says else "raise SystemExit(3)"]
    with pytest.raises(RuntimeError), flamingo:
        flamingo_report(flamingo, ["…"], "What is seen?")
    assert flamingo.child is None
