"""`valor convert-llava-med`: formats, memory, kills, bad input, and the converted folder in TRL and PEFT.
All on checkpoints fabricated in the true on-disk format."""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPConfig, CLIPModel

from valor.cli import main
from valor.files import whole_folder
from valor.policy import convert
from valor.policy.convert import (
    HUB_TOWER,
    ORIGINAL,
    PROMPTS,
    RENAME,
    TOWER,
    Piece,
    Shards,
    check_logits,
    check_plan,
    convert_llava_med,
    load_sentencepiece,
    make_plan,
    new_config,
    original_ids,
    read_config,
    rename,
    tower_config,
)
from valor.testing import RELEASED, miniature_llava_med, original_shapes, train_sentencepiece

COMMAND = [sys.executable, "-m", "valor", "convert-llava-med"]
ENV = os.environ | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
BIG = dict(shards=4, width=1024, inner=3584, layers=16, heads=16, kv_heads=4)  # 440 MB


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return miniature_llava_med(tmp_path_factory.mktemp("src") / "original")


@pytest.fixture(scope="module")
def folder(source):
    convert_llava_med(source, source.parent / "converted")
    return source.parent / "converted"


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    made = miniature_llava_med(tmp_path_factory.mktemp("big") / "original", **BIG)
    yield made
    shutil.rmtree(made.parent)


def left(folder):
    return [p.name for p in folder.parent.iterdir() if p.name in (folder.name, f".{folder.name}.making")]


@pytest.mark.parametrize("format,shards", [("safetensors", 1), ("bin", 1), ("bin", 3)])
def test_every_format_gives_the_same_model(source, folder, tmp_path, format, shards):
    src = miniature_llava_med(tmp_path / "o", format, shards)
    convert_llava_med(src, tmp_path / "d")
    one, other = Shards(folder), Shards(tmp_path / "d")
    assert one.where.keys() == other.where.keys() and all(torch.equal(one[k], other[k]) for k in one.where)
    assert len(set(other.where.values())) == shards


def test_whole_model_equals_the_hand_composition(source, folder):
    original, tower, files = make_plan(source)
    gap = check_logits(
        folder, load_sentencepiece(source, original), files, original, tower, torch.bfloat16, layers=3
    )
    print(f"relative gap {gap:.1e}")
    assert gap < 1e-5


def test_true_size_and_ids():
    "All 686 tensors of the 7B model, by shape only: the plan fits transformers' model."

    class Listed:
        shapes = original_shapes(RELEASED)

    config = ORIGINAL | dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    tower = tower_config({k.removeprefix(TOWER): s for k, s in Listed.shapes.items() if k.startswith(TOWER)})

    def grown(k):
        return 2 * (k in ("model.embed_tokens.weight", "lm_head.weight"))

    check_plan(
        "src",
        config,
        tower,
        [
            [
                Piece(rename(k, RENAME), Listed, k, (s[0] + grown(k), *s[1:]), grown(k))
                for k, s in Listed.shapes.items()
            ]
        ],
    )
    new, generation = new_config(config, tower, torch.bfloat16)
    assert (
        new["image_token_index"],
        new["pad_token_id"],
        new["text_config"]["vocab_size"],
        new["image_seq_length"],
        len(Listed.shapes),
    ) == (32000, 32001, 32002, 576, 686)


@pytest.mark.skipif(
    "VALOR_MISTRAL_TOKENIZER" not in os.environ,
    reason="VALOR_MISTRAL_TOKENIZER: path of Mistral 7B's tokenizer.model (tokenizer.model.v1 in the wheel "
    "mistral-common)",
)
def test_mistrals_own_vocabulary(tmp_path):
    "The true 32,000 pieces: as sentencepiece on 40,000 random texts and all Open-i reports."
    shutil.copy(os.environ["VALOR_MISTRAL_TOKENIZER"], tmp_path / "tokenizer.model")
    sp, rng = load_sentencepiece(tmp_path, dict(vocab_size=32000)), random.Random(1)
    tokenizer = convert.new_tokenizer(sp)
    words = [
        "left ",
        "effusion",
        " ",
        "  ",
        "     ",
        "\n",
        "\t",
        "é",
        "肺",
        "o",
        "pa",
        ".",
        "<image>",
        "</s>",
        "X",
        "🫁",
        "1",
        "\u00a0",
        "\u200b",
        "//",
        "==",
        " the",
    ]

    def letter():
        return chr(
            rng.randint(
                *rng.choice([(32, 126), (160, 0x24F), (0x370, 0x5FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)])
            )
        )

    texts = ["".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(20000)] + [
        "".join(letter() for _ in range(rng.randint(1, 40))) for _ in range(20000)
    ]
    import tarfile

    import torchxrayvision

    with tarfile.open(Path(torchxrayvision.__file__).parent / "data/NLMCXR_reports.tgz") as tar:
        texts += [re.sub("<[^>]+>", " ", tar.extractfile(m).read().decode()) for m in tar if m.isfile()]
    wrong = [t for t in [*PROMPTS, *texts] if tokenizer.encode(t).ids != original_ids(sp, t)]
    print(f"{len(wrong)} of {len(texts) + len(PROMPTS)} differ")
    assert not wrong and tokenizer.token_to_id("<image>") == 32000 and tokenizer.token_to_id("<pad>") == 32001


def test_full_resolution_image_and_576_tokens(tmp_path):
    src = miniature_llava_med(tmp_path / "o", image_size=336)
    convert_llava_med(src, tmp_path / "d")
    processor = AutoProcessor.from_pretrained(tmp_path / "d")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 90, 3), dtype=np.uint8)).resize(
        (700, 900), Image.BICUBIC
    )
    inputs = processor(
        images=image, text="<s>[INST] <image>\nq [/INST]", add_special_tokens=False, return_tensors="pt"
    )
    assert (inputs.input_ids == processor.image_token_id).sum() == 576 and inputs.pixel_values.shape[-2:] == (
        336,
        336,
    )
    assert (
        processor.patch_size,
        processor.num_additional_image_tokens,
        processor.vision_feature_select_strategy,
    ) == (14, 1, "default")
    square = Image.new("RGB", (900, 900), (122, 116, 104))
    square.paste(image, (100, 0))
    ip = processor.image_processor
    expected = (
        np.asarray(square.resize((336, 336), Image.BICUBIC)) / 255 - np.array(ip.image_mean)
    ) / np.array(ip.image_std)
    gap = np.abs(inputs.pixel_values[0].permute(1, 2, 0).numpy() - expected) * np.array(ip.image_std) * 255
    print(f"grey levels: largest {gap.max():.2f}, mean {gap.mean():.3f}")
    assert gap.max() < 4 and gap.mean() < 0.5
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "d")
    assert model(**inputs).logits.isfinite().all()


MEMORY = """
import sys; from pathlib import Path
from valor.policy.convert import convert_llava_med
from valor.testing import miniature_llava_med
status = lambda name: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024
small = Path(sys.argv[1])
convert_llava_med(miniature_llava_med(small / "o"), small / "d")  # what is imported late is imported now
for src in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")                                    # the peak starts anew
    base = status("VmRSS"); convert_llava_med(src, small / Path(src).name); print(status("VmHWM") - base)
"""


def as_bin(src, folder):
    "The checkpoint `src` in .bin files."
    new, shards = lambda n: n.replace("model-", "pytorch_model-").replace("safetensors", "bin"), Shards(src)
    folder.mkdir()
    for p in set(shards.where.values()):
        torch.save({k: shards[k] for k in shards.where if shards.where[k] == p}, folder / new(p.name))
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps(dict(weight_map={k: new(p.name) for k, p in shards.where.items()}))
    )
    for n in ("config.json", "tokenizer.model"):
        shutil.copy(src / n, folder / n)
    return folder


def test_peak_memory_is_below_the_largest_file(big, tmp_path):
    sources = [big, as_bin(big, tmp_path / "bin")]
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "out"), *map(str, sources)],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    largest = [max(p.stat().st_size for p in src.iterdir()) for src in sources]
    ratios = [int(peak) / size for peak, size in zip(done.stdout.split(), largest)]
    print(
        f"largest file {largest[0] / 1e6:.0f} MB; peak {ratios[0]:.2f} of it from safetensors, "
        f"{ratios[1]:.2f} from .bin"
    )
    assert min(largest) > 100e6 and max(ratios) < 1.3
    shutil.rmtree(tmp_path)


def test_killed_leaves_nothing_half_made_and_a_rerun_cleans_up(big, tmp_path):
    dst, work, end = tmp_path / "d", tmp_path / ".d.making", time.time() + 100
    process = subprocess.Popen(
        [*COMMAND, str(big), str(dst)], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (work / "model-00002-of-00004.safetensors").exists():
        assert process.poll() is None and time.time() < end, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert work.exists() and not dst.exists()
    (work / "left over").write_text("torn")
    convert_llava_med(big, dst)
    assert (
        left(dst) == ["d"] and not (dst / "left over").exists() and len(list(dst.glob("*.safetensors"))) == 4
    )
    shutil.rmtree(dst)


def test_one_at_a_time_and_never_over_what_is_there(source, tmp_path, capsys, monkeypatch):
    dst = tmp_path / "d"
    with whole_folder(dst) as work:
        (work / "mine").write_text("x")
        assert "another process is writing it" in refused(capsys, source, dst) and (work / "mine").exists()
    assert (
        left(dst) == ["d"]
        and "is there already" in refused(capsys, source, dst)
        and [p.name for p in dst.iterdir()] == ["mine"]
    )

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "check_tensors", interrupt)  # Ctrl-C in the middle
    with pytest.raises(KeyboardInterrupt):
        convert_llava_med(source, tmp_path / "other")
    assert left(tmp_path / "other") == []


def test_the_command_as_a_process(source, tmp_path):
    done = subprocess.run(
        [*COMMAND, str(source), str(tmp_path / "d"), "--dtype", "float16"],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (
        done.returncode == 0
        and "89 tensors" in done.stdout
        and "all equal to the original's" in done.stdout
        and "write and compare" in done.stderr
    ), done.stderr


def edit(name, **changes):
    return lambda f: (f / name).write_text(json.dumps(json.loads((f / name).read_text()) | changes))


def drop(key):
    def change(f):
        from safetensors.torch import load_file, save_file

        for p in f.glob("*.safetensors"):
            tensors = load_file(p)
            if tensors.pop(key, None) is not None:
                save_file(tensors, p)

    return change


def add(key, shape=(2, 2)):
    def change(f):
        from safetensors.torch import load_file, save_file

        p = sorted(f.glob("*.safetensors"))[0]
        save_file(load_file(p) | {key: torch.zeros(shape)}, p)

    return change


def unlisted(f):
    "A checkpoint from which a tensor is gone, index and all."
    drop("model.layers.1.mlp.up_proj.weight")(f)
    index = json.loads((f / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (f / "model.safetensors.index.json").write_text(json.dumps(index))


SECOND = "model-00002-of-00003.safetensors"
BAD = {
    "llava_llama": (
        edit("config.json", model_type="llava_llama"),
        ["config.json", "expected 'llava_mistral'", "llava-hf"],
    ),
    "transformers llava": (edit("config.json", model_type="llava"), ["config.json", "needs no conversion"]),
    "qwen": (edit("config.json", model_type="qwen2_5_vl"), ["config.json", "expected 'llava_mistral'"]),
    "linear projector": (
        edit("config.json", mm_projector_type="linear"),
        ["config.json", "mm_projector_type='linear'", "'mlp2x_gelu'"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "no such file", "hf download"]),
    "torn config": (lambda f: os.truncate(f / "config.json", 40), ["config.json", "not JSON", "hf download"]),
    "missing shard": (lambda f: (f / SECOND).unlink(), [SECOND, "no such file", "hf download"]),
    "truncated shard": (
        lambda f: os.truncate(f / SECOND, (f / SECOND).stat().st_size - 100),
        [SECOND, "truncated", "hf download"],
    ),
    "truncated header": (lambda f: os.truncate(f / SECOND, 100), [SECOND, "truncated", "hf download"]),
    "empty shard": (lambda f: os.truncate(f / SECOND, 0), [SECOND, "truncated", "hf download"]),
    "a page instead of a file": (
        lambda f: (f / SECOND).write_text("<html>not found</html>"),
        [SECOND, "truncated or damaged", "hf download"],
    ),
    "listed but absent": (
        drop("model.layers.1.mlp.up_proj.weight"),
        ["no tensor model.layers.1.mlp.up_proj.weight", "index.json places there", "hf download"],
    ),
    "missing": (unlisted, ["no tensor for language_model.model.layers.1.mlp.up_proj.weight", "hf download"]),
    "unknown": (
        add("model.image_newline"),
        ["model-00001-of-00003.safetensors", "unknown tensor model.image_newline", "merged first"],
    ),
    "left over": (
        edit("config.json", num_hidden_layers=2),
        ["left over tensor model.layers.2", "config.json"],
    ),
    "other shape": (
        edit("config.json", intermediate_size=96),
        ["has shape", "expected (64, 96)", "one checkpoint"],
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), ["tokenizer.model", "no such file"]),
    "other vocabulary": (
        lambda f: (f / "tokenizer.model").write_bytes(train_sentencepiece(400)),
        ["tokenizer.model", "400 pieces", "vocab_size=420"],
    ),
    "torn tokenizer": (
        lambda f: os.truncate(f / "tokenizer.model", 1000),
        ["tokenizer.model", "not a sentencepiece model"],
    ),
    "empty folder": (
        lambda f: [p.unlink() for p in f.glob("model*")],
        ["no model.safetensors or pytorch_model.bin", "hf download"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(source, tmp_path, case, capsys):
    change, words = BAD[case]
    shutil.copytree(source, tmp_path / "o")
    change(tmp_path / "o")
    message = refused(capsys, tmp_path / "o", tmp_path / "d")
    assert all(w in message for w in words), message
    assert left(tmp_path / "d") == []


def refused(capsys, *arguments):
    "What the command ends with, in this process."
    with pytest.raises(SystemExit) as e:
        main(["convert-llava-med", *map(str, arguments)])
    message = str(e.value)
    assert message.startswith("valor: ") and "\n" not in message, message
    return message


def test_truncated_bin_is_one_line(tmp_path, capsys):
    src = miniature_llava_med(tmp_path / "o", "bin")
    os.truncate(src / "pytorch_model-00002-of-00003.bin", 100_000)
    message = refused(capsys, src, tmp_path / "d")
    assert "pytorch_model-00002-of-00003.bin: truncated" in message and left(tmp_path / "d") == []


def test_bin_with_code_inside_is_not_run(tmp_path, capsys):
    src = miniature_llava_med(tmp_path / "o", "bin", shards=1)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"lm_head.weight": Evil()}, src / "pytorch_model.bin")
    assert (
        "not a plain dict of tensors" in refused(capsys, src, tmp_path / "d")
        and not (tmp_path / "ran").exists()
    )


def test_full_disk_is_said_before_anything_is_written(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    assert "make room" in refused(capsys, source, tmp_path / "d") and left(tmp_path / "d") == []


def test_a_failed_check_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "original_ids", lambda sp, text: [1])
    assert "token ids" in refused(capsys, source, tmp_path / "d") and left(tmp_path / "d") == []
    monkeypatch.undo()
    hand = convert.clip_by_hand
    monkeypatch.setattr(
        convert, "clip_by_hand", lambda read, tower, pixels: hand(read, tower, pixels).flip(1)
    )  # patches in the wrong order
    assert "logits differ" in refused(capsys, source, tmp_path / "d") and left(tmp_path / "d") == []


def clip(folder, **sizes):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1) | sizes
    CLIPModel(
        CLIPConfig(
            vision_config=sizes | dict(image_size=56, patch_size=14), text_config=sizes | dict(vocab_size=99)
        )
    ).save_pretrained(folder)


def test_another_tower(source, folder, tmp_path, capsys):
    clip(tmp_path / "clip")
    bare = miniature_llava_med(tmp_path / "bare", own_tower=False)
    assert (
        "no vision tower" in (message := refused(capsys, bare, tmp_path / "d"))
        and "--vision-tower openai" in message
    )
    for name, src in (("with", source), ("without", bare)):
        convert_llava_med(src, tmp_path / name, vision_tower=tmp_path / "clip")
    one, other, own, theirs = (
        Shards(p) for p in (tmp_path / "with", tmp_path / "without", folder, tmp_path / "clip")
    )
    assert one.where.keys() == other.where.keys() == own.where.keys()
    tower = [k for k in one.where if k.startswith("vision_tower")]
    assert all(
        torch.equal(one[k], theirs[k.removeprefix("vision_tower.")].bfloat16()) for k in tower
    ) and not all(torch.equal(one[k], own[k]) for k in tower)
    clip(tmp_path / "wide", hidden_size=128, num_attention_heads=2)
    assert (
        "linear_1" in (message := refused(capsys, bare, tmp_path / "d", "--vision-tower", tmp_path / "wide"))
        or "mm_projector" in message
    )
    assert "expected 'clip'" in refused(capsys, bare, tmp_path / "d", "--vision-tower", source)
    assert "no such folder" in refused(capsys, bare, tmp_path / "d", "--vision-tower", "open-ai")
    assert left(tmp_path / "d") == []


def test_tower_that_cannot_be_fetched(source, tmp_path):
    env = ENV | dict(HF_HOME=str(tmp_path / "empty"))
    done = subprocess.run(
        [*COMMAND, str(source), str(tmp_path / "d"), "--vision-tower", "openai"],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (
        done.returncode == 1
        and HUB_TOWER in done.stderr
        and "--vision-tower PATH" in done.stderr
        and done.stderr.count("\n") == 1
    ), done.stderr


def test_dtype(source, tmp_path):
    convert_llava_med(source, tmp_path / "d", dtype="float32")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "d", dtype="auto")
    assert model.dtype == torch.float32 and set(Shards(tmp_path / "d").dtypes.values()) == {torch.float32}
    with pytest.raises(ValueError, match="dtype='int8': allowed are"):
        convert_llava_med(source, tmp_path / "e", dtype="int8")


def test_saved_again_and_loaded_again(folder, source, tmp_path):
    "A trained model is saved by transformers, tokenizer and all: the ids must survive that."
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, sp = AutoProcessor.from_pretrained(tmp_path), load_sentencepiece(source, read_config(source))
    for p in PROMPTS:
        assert again.tokenizer(p).input_ids == original_ids(sp, p)
    assert again.chat_template == processor.chat_template and again.image_processor.do_pad
    other = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def studies(n=2):
    from datasets import Dataset, Features
    from datasets import Image as ImageColumn

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (60, 50, 3), dtype=np.uint8)) for _ in range(n)]
    return Dataset.from_dict(dict(image=images), features=Features(dict(image=ImageColumn())))


def test_sft_with_lora_and_generation(folder, tmp_path):
    "TRL's SFT with a PEFT adapter through this project's own functions, merged and sampled from."
    from valor.policy.models import load_policy
    from valor.policy.prompt import conversations
    from valor.policy.tiny import generate
    from valor.train.sft import sft

    log = sft(
        folder,
        conversations(studies(), ["No effusion.", "A small nodule."]),
        tmp_path / "sft",
        mode="lora",
        epochs=3,
        batch_size=2,
        lora_r=4,
        lora_alpha=8,
        lr=1e-2,
    )
    assert np.isfinite(log[0]["loss"])
    (base, processor), (trained, _) = load_policy(folder), load_policy(tmp_path / "sft")
    changed = {k for k, v in trained.state_dict().items() if not torch.equal(v, base.state_dict()[k])}
    assert changed and not any("vision_tower" in k for k in changed)
    reports = generate(trained, processor, [Image.new("L", (40, 70), 90)] * 2, max_new_tokens=8)
    assert len(reports) == 2 and "<image>" not in "".join(reports)


def test_grpo_step_with_lora(folder, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    from valor.policy.models import load_policy, lora_config
    from valor.policy.prompt import conversations

    model, processor = load_policy(folder)
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=8,
        max_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        beta=0.04,
        learning_rate=1e-2,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )

    def reward(completions, **kw):
        return [float(i) for i in range(len(completions))]

    trainer = GRPOTrainer(
        model,
        reward,
        args,
        train_dataset=conversations(studies()),
        processing_class=processor,
        peft_config=lora_config(model, "language", 4, 8),
    )
    trainer.train()
    weights = {k: v for k, v in trainer.model.named_parameters() if "lora_B" in k}
    assert (
        np.isfinite(trainer.state.log_history[0]["loss"])
        and any(v.abs().max() > 0 for v in weights.values())
        and not any("vision" in k for k in weights)
    )
