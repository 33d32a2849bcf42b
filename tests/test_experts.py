"""Every way to name an expert, on weights made up in the true formats: the features are right, what is
missing is named in one line, and training runs with each."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image

from valor.cli import main
from valor.config import preset
from valor.expert import frozen as experts
from valor.expert.frozen import (
    ExpertKind,
    FrozenExpert,
    LabelExpert,
    load_expert,
    open_clip_expert,
    prepared,
    read_weights,
    register_expert,
    try_expert,
    xrv,
    xrv_columns,
)
from valor.rewards.chexbert import LabelF1
from valor.rewards.guard import RewardError
from valor.rewards.rules import RuleLabeler
from valor.runs import makers, phases, processes
from valor.testing import miniature_biomedclip
from valor.vocabulary import OBSERVATIONS

ALL = "densenet121-res224-all"
FILMS = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (120, 100), dtype=np.uint8)) for i in range(3)
]
TEXTS = ["small left pleural effusion.", "", "no acute abnormality. " * 300]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A folder with a BiomedCLIP and a DenseNet, made up."
    here = tmp_path_factory.mktemp("weights")
    miniature_biomedclip(here / "BiomedCLIP")
    torch.manual_seed(0)
    net = xrv().models.DenseNet(num_classes=18).eval()
    torch.save(net, here / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(net.state_dict(), here / "state.pt")
    return here


def raises_one_line(error, f, *contained):
    with pytest.raises(error) as e:
        f()
    message = str(e.value)
    assert "\n" not in message and len(message) < 1000 and all(c in message for c in contained), message


# --- open_clip


def test_a_folder_mended_by_hand_gives_the_same_features(weights, tmp_path):
    mended = tmp_path / "mended"
    shutil.copytree(weights / "BiomedCLIP", mended)
    config = json.loads((mended / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= dict(hf_model_name=str(mended), hf_tokenizer_name=str(mended))
    (mended / "open_clip_config.json").write_text(json.dumps(config))
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{mended}")
    with torch.inference_mode():
        images = model.eval().encode_image(torch.stack([preprocess(f) for f in FILMS]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{mended}")(TEXTS), normalize=True)
    ours = load_expert(str(weights / "BiomedCLIP"))
    torch.testing.assert_close(ours.image_features(FILMS), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.text_features(TEXTS), texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.similarity(FILMS, TEXTS), (images * texts).sum(1), atol=1e-5, rtol=0)
    assert ours.cut(TEXTS) == [False, False, True] and "256 tokens" in ours.note


def test_the_text_towers_parts_may_come_from_another_folder(weights, tmp_path):
    split, tower = tmp_path / "split", tmp_path / "tower"
    shutil.copytree(weights / "BiomedCLIP", split)
    tower.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.move(split / name, tower / name)
    config = json.loads((split / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= dict(hf_model_name=str(tower), hf_tokenizer_name=str(tower))
    (split / "open_clip_config.json").write_text(json.dumps(config))
    assert torch.equal(
        load_expert(str(split)).text_features(TEXTS),
        load_expert(str(weights / "BiomedCLIP")).text_features(TEXTS),
    )


def text_cfg(folder, **changes):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= changes
    (folder / "open_clip_config.json").write_text(json.dumps(config))


FAULTS = {
    "no text configuration": (
        lambda f: (f / "config.json").unlink(),
        ("config.json", "BiomedBERT", "hf download"),
    ),
    "no vocabulary": (lambda f: (f / "tokenizer.json").unlink(), ("tokenizer.json", "hf download")),
    "no weights": (lambda f: (f / "open_clip_pytorch_model.bin").unlink(), ("no weights",)),
    "no tokenizer name": (lambda f: text_cfg(f, hf_tokenizer_name=""), ("hf_tokenizer_name is empty",)),
    "torn weights": (
        lambda f: (f / "open_clip_pytorch_model.bin").write_bytes(b"PK\3\4" + bytes(50)),
        ("cannot load it",),
    ),
    "another architecture": (lambda f: text_cfg(f, hf_proj_type="linear"), ("cannot load it", "text.proj")),
    "torn configuration": (
        lambda f: (f / "open_clip_config.json").write_text('{"model_cfg": {'),
        ("open_clip_config.json", "not an open_clip configuration"),
    ),
    "another configuration": (
        lambda f: (f / "open_clip_config.json").write_text('{"architectures": []}'),
        ("not an open_clip configuration", "model_cfg"),
    ),
    "another vocabulary": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("30522", "100")),
        ("cannot load it",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_folder_is_one_line(weights, tmp_path, fault):
    shutil.copytree(weights / "BiomedCLIP", tmp_path / "bad")
    change, contained = FAULTS[fault]
    change(tmp_path / "bad")
    with patch("huggingface_hub.hf_hub_download", side_effect=OSError("no network")):
        raises_one_line(ValueError, lambda: load_expert(str(tmp_path / "bad")), "bad", *contained)


def test_a_plain_clip_has_its_own_vocabulary(tmp_path):
    tiny = dict(
        embed_dim=16,
        vision_cfg=dict(image_size=64, layers=1, width=32, head_width=16, patch_size=32),
        text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1),
    )
    model = open_clip.CLIP(**tiny).eval()
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=tiny, preprocess_cfg={})))
    expert = load_expert(str(tmp_path))
    with torch.inference_mode():
        torch.testing.assert_close(
            expert.text_features(TEXTS),
            model.encode_text(open_clip.tokenize([t.strip() for t in TEXTS]), normalize=True),
            atol=1e-5,
            rtol=0,
        )
    assert expert.cut(["lung " * 75, "lung " * 76, ""]) == [False, True, False]
    small = tiny | dict(text_cfg=tiny["text_cfg"] | dict(vocab_size=1000))
    torch.save(open_clip.CLIP(**small).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=small, preprocess_cfg={})))
    raises_one_line(ValueError, lambda: load_expert(str(tmp_path)), "49408 ids", "1000 rows")


def test_the_hub_out_of_reach_is_one_line():
    with patch("open_clip.get_model_config", side_effect=RuntimeError("offline\nand more")):
        raises_one_line(
            ValueError,
            lambda: open_clip_expert("hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"),
            "hf-hub:microsoft",
            "give a folder",
        )


# --- torchxrayvision


def test_the_pickled_model_gives_the_packages_probabilities(weights):
    "The package's own constructor, on the same file under its released name, against ours."
    models = xrv().models
    cache = weights / "cache"
    cache.mkdir()
    released = cache / os.path.basename(models.model_urls[ALL]["weights_url"])
    shutil.copy(weights / "old.pt", released)
    theirs, judge = models.DenseNet(weights=ALL, cache_dir=str(cache)), load_expert(f"xrv:{released}")
    with torch.inference_mode():
        p = theirs(torch.from_numpy(np.stack([prepared(f, 224) for f in FILMS])))
    column = [xrv_columns(ALL)[o][0] for o in judge.inner.observations]
    centred = torch.nn.functional.normalize(2 * p[:, column] - 1, dim=1)
    torch.testing.assert_close(judge.image_features(FILMS), centred, atol=1e-5, rtol=0)
    assert judge.inner.observations == OBSERVATIONS[:12] and "Support Devices" in judge.note
    assert all(
        theirs.targets[c] == {"Pleural Effusion": "Effusion", "Pleural Other": "Pleural_Thickening"}.get(o, o)
        for o, c in zip(judge.inner.observations, column)
    )
    assert (
        judge.key == load_expert(f"xrv:{ALL}:{weights / 'state.pt'}").key
    )  # the same weights, whatever the file


def test_models_that_know_less():
    assert list(xrv_columns("densenet121-res224-rsna")) == ["Lung Opacity", "Pneumonia"]
    nih, labels = (
        xrv_columns("densenet121-res224-nih"),
        xrv().models.model_urls["densenet121-res224-nih"]["labels"],
    )
    assert (
        [labels[c] for c in nih["Lung Lesion"]] == ["Nodule", "Mass"]
        and [labels[c] for c in nih["Lung Opacity"]] == ["Infiltration"]
        and "Fracture" not in nih
    )
    resnet = xrv().models.model_urls["resnet50-res512-all"]
    assert [resnet["labels"][c] for c in xrv_columns("resnet50-res512-all")["Lung Lesion"]] == [
        "Nodule",
        "Mass",
    ]  # its own Lung Lesion has no operating point


def test_the_resnet_is_a_state_dict(tmp_path):
    import torchvision

    net = torchvision.models.resnet50(num_classes=18)
    net.conv1 = torch.nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    torch.save(net.state_dict(), tmp_path / "resnet.pt")
    expert = load_expert(f"xrv:resnet50-res512-all:{tmp_path / 'resnet.pt'}")
    assert expert.image_features(FILMS[:1]).shape == (1, 11) and expert.inner.classify(FILMS[:1]).min() >= 0


def test_preparing_is_the_packages(tmp_path):
    from skimage.io import imsave

    for i, shape in enumerate([(300, 200), (200, 300), (96, 96), (513, 512)]):
        film = np.random.default_rng(i).integers(0, 255, shape, dtype=np.uint8)
        imsave(tmp_path / "film.png", film, check_contrast=False)
        theirs = xrv().datasets.XRayResizer(224)(
            xrv().datasets.XRayCenterCrop()(xrv().utils.load_image(str(tmp_path / "film.png")))
        )
        assert np.array_equal(prepared(Image.fromarray(film), 224), theirs)
    assert prepared(Image.new("L", (50, 50)), 224).max() == -1024


@pytest.mark.skipif(
    "VALOR_REAL_CXR" not in os.environ, reason="VALOR_REAL_CXR: a folder of real chest radiographs"
)
def test_real_films_are_prepared_as_the_package_does(weights):
    from valor.data.images import read_image

    paths = [p for p in sorted(Path(os.environ["VALOR_REAL_CXR"]).iterdir()) if p.suffix in (".png", ".jpg")]
    judge, clip = load_expert(f"xrv:{ALL}:{weights / 'state.pt'}"), load_expert(str(weights / "BiomedCLIP"))
    for path in paths:
        image = Image.fromarray(read_image(path))
        theirs = xrv().datasets.XRayResizer(224)(
            xrv().datasets.XRayCenterCrop()(xrv().utils.load_image(str(path)))
        )
        assert (
            np.abs(prepared(image, 224) - theirs).max() <= 16
        )  # colour JPEGs: the package takes the red channel, we the grey value
        assert (
            judge.image_features([image]).shape == (1, 12) and clip.image_features([image]).isfinite().all()
        )


class Harm:
    def __reduce__(self):
        return (os.mkdir, ("harm",))


def test_a_pickle_cannot_do_anything(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = xrv().models.DenseNet(num_classes=2, block_config=(1, 1))
    net.features.harm = Harm()
    for new in (True, False):
        torch.save(net, "evil.pt", _use_new_zipfile_serialization=new)
        raises_one_line(ValueError, lambda: read_weights("evil.pt"), "evil.pt", "posix.mkdir")
    torch.save({"a": Harm()}, "evil.pt")
    raises_one_line(ValueError, lambda: read_weights("evil.pt"), "posix.mkdir")
    assert not Path("harm").exists()


def test_bad_weights_are_one_line(weights, tmp_path):
    for name in ("old.pt", "state.pt"):
        whole = (weights / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        raises_one_line(ValueError, lambda: load_expert(f"xrv:{ALL}:{tmp_path / name}"), name)
    (tmp_path / "text.pt").write_text("not weights")
    raises_one_line(
        ValueError,
        lambda: load_expert(f"xrv:{ALL}:{tmp_path / 'text.pt'}"),
        "text.pt",
        "expected a state dict",
    )
    torch.save([1, 2], tmp_path / "list.pt")
    raises_one_line(ValueError, lambda: load_expert(f"xrv:{ALL}:{tmp_path / 'list.pt'}"), "a list")
    torch.save({"classifier.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    raises_one_line(
        ValueError,
        lambda: load_expert(f"xrv:{ALL}:{tmp_path / 'other.pt'}"),
        "other.pt",
        "not the weights of",
        "https://",
    )
    with patch.object(xrv().models, "get_weights", side_effect=ConnectionError("no network")):
        raises_one_line(
            ValueError, lambda: load_expert(f"xrv:{ALL}"), ALL, "https://github.com/mlmed", "give expert="
        )


# --- labels


@pytest.mark.parametrize("uncertain, value", [("positive", 1.0), ("negative", -1.0), ("class", 0.0)])
def test_an_uncertain_observation_counts_as_the_labeler_says(uncertain, value):
    expert = LabelExpert(None, ["Pneumonia", "Edema"], LabelF1(uncertain=uncertain))
    assert expert.text_features(["possible pneumonia.", "no pneumonia. pulmonary edema."]).tolist() == [
        [value, -1.0],
        [-1.0, 1.0],
    ]


def test_only_centred_vectors_rank_reports_right():
    observations = OBSERVATIONS[:12]
    normal = FrozenExpert(
        LabelExpert(lambda images: np.full((len(images), 12), 0.1), observations, RuleLabeler()),
        "normal film",
    )
    reports = [
        "no acute abnormality.",
        "small pleural effusion.",
        "cardiomegaly. pneumonia. edema. atelectasis. pneumothorax. pleural effusion. consolidation. lung "
        "opacity.",
    ]
    s = normal.similarity(FILMS, reports)
    assert s.argsort(descending=True).tolist() == [0, 1, 2] and s[0] == pytest.approx(1)
    silent = FrozenExpert(
        LabelExpert(lambda images: np.full((len(images), 1), 0.5), ["Pneumonia"], LabelF1(uncertain="class")),
        "silent",
    )
    assert silent.similarity(FILMS, ["pneumonia.", "possible pneumonia.", ""]).tolist() == [
        0,
        0,
        0,
    ]  # zero vectors: no NaN


# --- image features on disk


class Slow:
    key = "slow"

    def image_features(self, images):
        time.sleep(0.01)
        return np.stack([np.asarray(im, dtype=float).ravel()[:4] + 1 for im in images])

    def text_features(self, texts):
        return np.ones((len(texts), 4))


def many(n):
    return [np.random.default_rng(i).integers(0, 255, (4, 4), dtype=np.uint8) for i in range(n)]


def work(folder):
    FrozenExpert(Slow(), "slow", cache=folder).image_features(many(300))


def test_processes_share_features_and_a_killed_one_leaves_nothing_half_written(tmp_path):
    fork = multiprocessing.get_context("fork")
    killed, other = (fork.Process(target=work, args=(tmp_path,)) for _ in range(2))
    killed.start()
    deadline = time.time() + 60

    def known():
        return len(
            FrozenExpert(Slow(), "slow", cache=tmp_path).cache.store.get(
                [experts.image_key(Image.fromarray(f)) for f in many(300)]
            )
        )

    while not known():
        assert time.time() < deadline and killed.is_alive()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    left = known()
    assert 0 < left < 300 and left % 64 == 0
    other.start()
    here = FrozenExpert(Slow(), "slow", cache=tmp_path)
    vectors = here.image_features(many(300))  # at the same time as the other
    other.join()
    assert other.exitcode == 0 and here.computed == 300 - left and known() == 300
    assert torch.equal(vectors, FrozenExpert(Slow(), "slow").image_features(many(300)))


def test_features_are_kept_by_pixels_and_by_expert(weights, tmp_path):
    name = str(weights / "BiomedCLIP")
    first, second = (load_expert(name, cache=tmp_path) for _ in range(2))
    a = first.image_features([FILMS[0], FILMS[1], FILMS[0]])
    assert first.computed == 2 and torch.equal(a[0], a[2])
    assert torch.equal(second.image_features(FILMS[:2]), a[:2]) and second.computed == 0
    assert torch.equal(load_expert(name).image_features(FILMS[:2]), a[:2])  # to the bit, kept or not
    other = load_expert(str(miniature_biomedclip(tmp_path / "other", seed=1)), cache=tmp_path)
    other.image_features(FILMS[:1])
    assert other.computed == 1 and other.key != first.key
    assert first.image_features([FILMS[0].convert("RGB")]).shape == a[:1].shape and first.computed == 3


# --- one's own, and names

OWN = """
import numpy as np

class Own:
    key = "own 1"
    def image_features(self, images):
        return np.array([[np.asarray(im.convert("L")).mean() / 255, 1.] for im in images])
    def text_features(self, texts): return np.array([[t.count("opacity"), 1. + len(t)] for t in texts])

def made(): return Own()
one, nothing = Own(), 3
class Hungry:
    def __init__(self, weights): pass
class Half:
    def image_features(self, images): return np.ones((len(images), 2))
class Two(Half):
    def text_features(self, texts): return np.ones((len(texts), 3))
class Fails(Half):
    def text_features(self, texts): return np.ones((len(texts), 2)) if all(texts) else 1 / 0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_expert.py").write_text(OWN)
    (tmp_path / "torn_expert.py").write_text("class Torn(:")
    monkeypatch.syspath_prepend(tmp_path)


def test_ones_own_expert(own, tmp_path):
    same = [
        try_expert(load_expert(f"own_expert:{a}", cache=tmp_path / "s")).similarity(FILMS, TEXTS)
        for a in ("Own", "made", "one")
    ]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    for name, contained in {
        "own_expert:nothing": "cannot be made",
        "own_expert:Hungry": "cannot be made",
        "own_expert:Half": "text_features",
        "own_expert:Absent": "cannot be imported",
        "torn_expert:Torn": "SyntaxError",
        "no_such_module:Expert": "cannot be imported",
    }.items():
        raises_one_line(ValueError, lambda: preset("smoke", expert=name), f"expert={name!r}", contained)
    raises_one_line(RewardError, lambda: try_expert(load_expert("own_expert:Two")), "2 dimensions", "3")
    raises_one_line(RewardError, lambda: try_expert(load_expert("own_expert:Fails")), "ZeroDivisionError")


def test_one_registration_adds_an_expert(own, monkeypatch):
    import own_expert

    monkeypatch.setattr(experts, "EXPERTS", dict(experts.EXPERTS))
    kind = ExpertKind("mine", lambda name, labeler: own_expert.Own(), check=lambda name: seen.append(name))
    seen = []
    raises_one_line(ValueError, lambda: preset("smoke", expert="mine"), "register_expert")
    register_expert(kind)
    for name in ("mine", "mine:of-1.pt"):
        assert preset("smoke", expert=name).expert == name and seen[-1] == name
        loaded = try_expert(load_expert(name))
        assert loaded.name == name and loaded.key == "own 1"
        assert torch.equal(
            loaded.similarity(FILMS, TEXTS), load_expert("own_expert:Own").similarity(FILMS, TEXTS)
        )
    register_expert(ExpertKind("mine", lambda name, labeler: own_expert.Half()))  # the last one counts
    raises_one_line(ValueError, lambda: load_expert("mine"), "expert='mine'", "text_features")


def test_names_are_checked_with_the_configuration(weights, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in (
        "embedded",
        "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        str(weights / "BiomedCLIP"),
        f"xrv:{ALL}",
        f"xrv:{ALL}:{weights / 'old.pt'}",
    ):
        assert preset("smoke", expert=name).expert == name
    for name, contained in {
        "xrv:densenet999": "expected xrv:NAME",
        f"xrv:{ALL}:/nowhere.pt": "no such file",
        "xrv:/nowhere/some.pt": "expected xrv:NAME",
        "/nowhere": "no such folder",
        "weights/BiomedCLIP": "no such folder",
        str(tmp_path / "empty"): "no open_clip_config.json",
        "hf-hub:BiomedCLIP": "expected",
        "BiomedCLIP": "expected",
    }.items():
        raises_one_line(ValueError, lambda: preset("smoke", expert=name), f"expert={name!r}", contained)
    raises_one_line(ValueError, lambda: load_expert("embedded"), "a run trains it")


# --- in a run

SMALL = dict(
    threads=1,
    n_train=24,
    n_test=16,
    expert_steps=2,
    base_studies=24,
    warmup_epochs=0,
    sft_epochs=1,
    stage1_steps=2,
    stage2_steps=2,
    group_size=2,
    max_new_tokens=12,
    n_boot=10,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "One runs folder for all: data, base, SFT and stage 1 are made once."
    folder = tmp_path_factory.mktemp("runs")
    with patch.dict(os.environ, VALOR_RUNS=str(folder)):
        yield folder


def test_the_main_job_with_biomedclip_reports_what_was_cut(runs, weights, tmp_path, capsys):
    clip = miniature_biomedclip(tmp_path / "BiomedCLIP", context_length=8)
    main(
        [
            "run",
            "--preset",
            "smoke",
            "--set",
            f"expert={clip}",
            *[s for k, v in SMALL.items() for s in ("--set", f"{k}={v}")],
        ]
    )
    said = capsys.readouterr().out
    assert (
        f"expert {clip} (reads 8 tokens of a text); beyond its context and cut: " in said
        and "16 of 16 reports of" in said
    ), said
    cfg = preset("smoke", expert=str(clip), **SMALL)
    log = pd.read_csv(phases.phase_folder("stage2", cfg) / "log.csv")
    assert (log["rewards/cut/mean"] > 0).all() and log["rewards/similarity/mean"].between(-1, 1).all()
    frame = makers.read_frame(phases.phase_folder("eval_stage2", cfg), "test")
    assert frame["cut"].sum() > 0 and frame["retrieved"].notna().all()
    miniature_biomedclip(clip, context_length=8, seed=1)  # other weights where the run found its own
    raises_one_line(
        processes.RunError,
        lambda: makers.open_expert(phases.phase_folder("expert", cfg), cfg),
        "other weights",
        "move",
    )


@pytest.mark.parametrize("kind", ["xrv", "own"])
def test_stage_2_and_its_evaluation_with(kind, runs, weights, own):
    cfg = preset(
        "smoke", expert={"xrv": f"xrv:{ALL}:{weights / 'old.pt'}", "own": "own_expert:Own"}[kind], **SMALL
    )
    log = pd.read_csv(phases.ensure("stage2", cfg) / "log.csv")
    assert (
        len(log) == 2
        and log["rewards/similarity/mean"].between(-1, 1).all()
        and "rewards/cut/mean" not in log
    )
    frame = makers.read_frame(phases.ensure("eval_stage2", cfg), "test")
    assert frame["retrieved"].notna().all() and frame["cut"].isna().all()
    note = makers.expert_note(cfg, {"VALOR": {0: frame}})
    assert (
        note.startswith(f"expert {cfg.expert}")
        and "does not tell which reports it cut" in note
        and (kind == "own" or "12 observations count" in note)
    )


def test_valor_evaluate_takes_any_expert(weights, tmp_path):
    from valor.data.images import square
    from valor.metrics.evaluate import DEFAULTS, image_columns

    squares = [square(np.asarray(film)) for film in FILMS]  # as a run shows films to its expert
    for i, film in enumerate(FILMS):
        film.save(tmp_path / f"{i}.png")
    frame = pd.DataFrame(dict(candidate=TEXTS, reference=TEXTS, image=[f"{i}.png" for i in range(3)]))
    for name in (str(weights / "BiomedCLIP"), f"xrv:{ALL}:{weights / 'old.pt'}"):
        out = image_columns(frame, DEFAULTS | dict(expert=name), tmp_path)
        np.testing.assert_allclose(out.similarity, load_expert(name).similarity(squares, TEXTS), atol=1e-6)
    assert out["cut"].isna().all() and image_columns(
        frame, DEFAULTS | dict(expert=str(weights / "BiomedCLIP")), tmp_path
    )["cut"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("tower", ["patches", "films"])
def test_equal_arguments_give_equal_classifiers(tower, tmp_path):
    "Whatever torch drew before, and torch's generator is left as it was."
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)) for _ in range(8)]
    labels, bytes_of = np.eye(8, 2, dtype=int), []
    for before in (1, 2):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        experts.train_classifier(images, labels, ["Edema", "Cardiomegaly"], tmp_path, steps=3, tower=tower)
        assert torch.equal(torch.get_rng_state(), state)
        bytes_of.append((tmp_path / "classifier.safetensors").read_bytes())
    assert bytes_of[0] == bytes_of[1]
