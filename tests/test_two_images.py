"""Studies with two images: the visual reward, its placebo, retrieval and the experts that a run trains see
both; with one image everything is as it was."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from valor.config import preset
from valor.expert import two_images
from valor.expert.controls import by_expert, by_placebo, partners
from valor.expert.embedded import build_expert
from valor.expert.frozen import FrozenExpert, LabelExpert
from valor.metrics import evaluate
from valor.metrics import statistics as ev
from valor.policy.prompt import conversations
from valor.rewards.rules import RuleLabeler
from valor.runs import makers
from valor.runs.phases import phase_key
from valor.train.grpo import Rewards
from valor.vocabulary import OBSERVATIONS

TEXTS = ["the heart is enlarged.", "there is a left pleural effusion.", "the lungs are clear."] * 4
N = len(TEXTS)


def film(i):
    return PILImage.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64), dtype=np.uint8))


def studies(second=lambda i: i % 3 != 2):
    "Twelve studies; those for which `second(i)` holds have a lateral image."
    has = [bool(second(i)) for i in range(N)]
    rows = dict(study_id=[f"s{i}" for i in range(N)], report=TEXTS, image=[film(i) for i in range(N)])
    rows |= dict(second_image=[film(100 + i) if has[i] else None for i in range(N)])
    rows |= dict(second_view=["lateral" if h else "" for h in has])
    labels = RuleLabeler().labels(TEXTS)[OBSERVATIONS].fillna(0).to_numpy()
    rows |= dict(labels=labels.tolist(), truth=[[] for _ in range(N)])
    kinds = dict(study_id=Value("string"), report=Value("string"), image=Image(), second_image=Image())
    data = Dataset.from_dict({name: rows[name] for name in kinds}, Features(kinds))
    for name in ("second_view", "labels"):
        data = data.add_column(name, rows[name])
    return data


def joint_space():
    return FrozenExpert(build_expert(TEXTS, 64), "joint")


def label_space():
    "A classifier whose probabilities follow the image's grey values, and the rules for reports."

    def classify(images):
        return torch.tensor([np.asarray(im)[0, :14] / 255 for im in images], dtype=torch.float32)

    return FrozenExpert(LabelExpert(classify, OBSERVATIONS, RuleLabeler()), "labels")


EXPERTS = pytest.mark.parametrize("make", [joint_space, label_space])


def by_hand(expert, data):
    "What each report has with its study's images, one by one, then the mean."
    one = expert.similarity(data["image"], TEXTS).tolist()
    return [
        x if second is None else (x + expert.similarity([second], [text]).item()) / 2
        for x, second, text in zip(one, data["second_image"], TEXTS)
    ]


@EXPERTS
def test_the_visual_reward_is_the_mean_over_both_images(make):
    data, expert = studies(), make()
    scores = by_expert(expert)(TEXTS, list(data))
    assert scores == pytest.approx(by_hand(expert, data), abs=1e-6)
    main = expert.similarity(data["image"], TEXTS).tolist()
    assert [a != b for a, b in zip(scores, main)] == [bool(v) for v in data["second_view"]]


@EXPERTS
def test_in_training_the_reward_function_is_given_both(make):
    "Through the columns that TRL hands to reward functions, as `conversations` prepares them."
    data, expert = studies(), make()
    rows = list(conversations(data))
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    assert "second_image" not in columns and [len(x) for x in columns["images"]][:3] == [2, 2, 1]
    rewards = Rewards({}, None, by_expert(expert))
    function = next(f for f in rewards.functions() if f.__name__ == "similarity")
    assert function(completions=TEXTS, **columns) == pytest.approx(by_hand(expert, data), abs=1e-6)


@EXPERTS
def test_the_placebo_takes_both_images_of_another_study(make):
    data, expert = studies(), make()
    other = partners(N, seed=3)
    shown = [[im for im in (data[int(p)]["image"], data[int(p)]["second_image"]) if im] for p in other]
    wanted = [expert.similarity(s, [t] * len(s)).mean().item() for s, t in zip(shown, TEXTS)]
    assert by_placebo(expert, data, seed=3)(TEXTS, list(data)) == pytest.approx(wanted, abs=1e-6)
    assert {len(s) for s in shown} == {1, 2}


@EXPERTS
def test_without_a_second_image_every_number_is_as_it_was(make):
    "To the bit, whether the column is there and empty or is not there at all."
    expert, empty = make(), studies(lambda i: False)
    was = expert.similarity(empty["image"], TEXTS).tolist()
    for data in (empty, empty.remove_columns(["second_image", "second_view"])):
        assert by_expert(expert)(TEXTS, list(data)) == was
        assert np.array_equal(ev.study_vectors(expert, data), expert.image_features(data["image"]))
        assert two_images.second_images(data) == []
        images, labels = makers.labelled_images(data)
        assert len(images) == N and labels.shape == (N, 14)


@EXPERTS
def test_retrieval_and_agreement_use_both_images(make, monkeypatch):
    data, expert = studies(), make()
    distinct = list(dict.fromkeys(TEXTS))
    sums = np.zeros((N, len(distinct)))
    for i, row in enumerate(data):
        shown = [im for im in (row["image"], row["second_image"]) if im]
        for j, text in enumerate(distinct):
            sums[i, j] = expert.similarity(shown, [text] * len(shown)).mean()
    wanted = [ev.as_completion(distinct[j]) for j in sums.argmax(1)]
    assert ev.retrieval_by_expert(data, data, expert) == wanted
    given = []
    monkeypatch.setattr(ev, "study_keys", lambda dataset: list(range(N)))
    monkeypatch.setattr(ev, "retrieved", lambda texts, images, others: given.append(images) or 1.0)
    ev.expert_columns(TEXTS, data, expert, None, 0)
    products = given[0] @ np.asarray(expert.text_features(TEXTS)).T
    assert products.diagonal() == pytest.approx(by_hand(expert, data), abs=1e-5)


def test_experts_that_a_run_trains_learn_from_both(monkeypatch):
    data, given = studies(), {}
    monkeypatch.setattr(makers, "train_expert", lambda *a, **k: given.update(k))
    cfg = preset("smoke", benchmark="table", data_root="t.jsonl")
    makers.fit_expert(cfg, data, None)
    (other,) = given["renderings"]
    seen = [im.tobytes() for im in other["image"]]
    assert seen[0] == film(100).tobytes() and seen[2] == film(2).tobytes()  # study 2 has one
    makers.fit_expert(cfg, studies(lambda i: False), None)
    assert given["renderings"] == []
    images, labels = makers.labelled_images(data)
    assert len(images) == N + 8 and np.array_equal(
        labels[N:], np.array(data["labels"])[np.arange(N) % 3 != 2]
    )
    assert images[N].tobytes() == film(100).tobytes()


def test_a_run_with_two_images_has_an_expert_of_its_own_and_others_keep_their_keys():
    real = dict(benchmark="table", data_root="t.jsonl")
    cfg, names = preset("smoke", **real), ("expert", "stage2", "trust", "controls", "eval_sft")
    two = preset("smoke", **real, data_options=dict(view="both"))
    from valor.runs.phases import phase_config

    assert "images" not in phase_config("expert", cfg) and "images" in phase_config("expert", two)
    assert "images" not in phase_config("expert", preset("smoke"))
    for name in names[1:]:
        assert phase_config(name, two)["after"]["expert"] == phase_key("expert", two)


def test_samples_in_trackers_and_valor_watch_show_both_images(tmp_path):
    from types import SimpleNamespace

    from datasets import DatasetDict

    from valor.runs.watch import Studies
    from valor.train.trackers import newest_samples

    data = studies()
    rows = [row for row in conversations(data) for _ in range(2)]
    done = SimpleNamespace(_inputs=rows, newest_rewards=[0.5] * len(rows), num_generations=2)
    done._logs = dict(completion=["clear."] * len(rows))
    assert [s.film.size for s in newest_samples(done, 3)] == [(128, 64), (128, 64), (64, 64)]
    DatasetDict(train=data).save_to_disk(tmp_path / "dataset")
    job = Studies(tmp_path)
    sizes = []
    for name in ("s0", "s2"):
        url = job.show(name, side=32)[1]
        sizes.append(PILImage.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size)
    assert sizes == [(64, 32), (32, 32)]


def test_valor_evaluate_reads_a_list_of_images_as_valor_generate_writes_it(tmp_path, monkeypatch):
    data, expert = studies(), joint_space()
    lines = []
    for i, row in enumerate(data):
        for name in ("image", "second_image"):
            if row[name]:
                row[name].save(tmp_path / f"{i}{name}.png")
        paths = [f"{i}{name}.png" for name in ("image", "second_image") if row[name]]
        lines.append(dict(id=str(i), candidate=TEXTS[i], reference=f"study {i}", image=paths))
    lines[2]["image"] = lines[2]["image"][0]  # one path, as before
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("valor.expert.frozen.load_expert", lambda *a: expert)
    (frame,) = evaluate.systems_in([tmp_path / "r.jsonl"]).values()
    columns = evaluate.image_columns(frame, evaluate.DEFAULTS | dict(expert="mine"), tmp_path)
    assert columns.similarity.tolist() == pytest.approx(by_hand(expert, data), abs=1e-5)
    frame["image"] = [[]] * N
    with pytest.raises(evaluate.NotRun, match="a path, or a list of paths"):
        evaluate.image_columns(frame, evaluate.DEFAULTS | dict(expert="mine"), tmp_path)
    frame["image"] = [["gone.png"]] * N
    with pytest.raises(ValueError, match="gone.png: no such file"):
        evaluate.image_columns(frame, evaluate.DEFAULTS | dict(expert="mine"), tmp_path)
