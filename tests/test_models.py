"""Any image-text-to-text model through one loader: miniatures of five architectures in the true on-disk
format, through loading, sampling, SFT, both stages of GRPO, merging and `valor generate`."""

import functools
import json
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from valor.config import preset
from valor.policy.convert import convert_llava_med
from valor.policy.models import (
    frozen_weights,
    groups,
    image_tokens,
    load_policy,
    lora_config,
    save_policy,
)
from valor.policy.prompt import conversations, render_prompt
from valor.policy.tiny import generate
from valor.testing import KINDS, miniature_llava_med, miniature_policy
from valor.train.sft import sft

ALL = (*KINDS, "llava_med")
ADDING = Path(__file__).resolve().parents[1] / "docs" / "adding-your-own.md"
REPORT = "<report> the heart is enlarged. no effusion. </report>"
FILMS = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (70, 60), dtype=np.uint8)) for i in range(2)
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    convert_llava_med(
        miniature_llava_med(
            home / "original", width=32, inner=64, layers=2, tower_width=64, tower_inner=64, tower_layers=2
        ),
        home / "llava_med",
    )
    return {k: miniature_policy(k, home / k) for k in KINDS} | dict(llava_med=home / "llava_med")


def studies():
    return Dataset.from_dict(
        dict(image=FILMS, report=[REPORT] * 2), features=Features(image=ImageColumn(), report=Value("string"))
    )


def logits(folder):
    model, processor = load_policy(folder)
    return run(model.eval(), processor)


def run(model, processor):
    inputs = processor(
        images=[[FILMS[0].convert("RGB")]],
        text=[render_prompt(processor)],
        return_tensors="pt",
        add_special_tokens=False,
    )
    with torch.inference_mode():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", ALL)
def test_prompt_is_one_and_the_same_for_sampling_sft_and_grpo(kind, folders, tmp_path):
    """The ids that this package samples from are those that TRL's GRPO samples from, which are those that
    its SFT trains on."""
    from valor.policy.prompt import as_prompt

    model, processor = load_policy(folders[kind])
    ours = processor(
        images=[[FILMS[0].convert("RGB")]],
        text=[render_prompt(processor)],
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
    )
    turn = [
        [
            dict(
                role="user",
                content=[
                    dict(type="image", image=FILMS[0].convert("RGB")),
                    dict(type="text", text=as_prompt()[0]["content"]),
                ],
            )
        ]
    ]
    grpo = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert ours.input_ids[0].tolist() == list(grpo["input_ids"][0])
    places = (ours.input_ids == model.config.image_token_id).sum().item()
    assert places == {"llava": 16, "qwen2_5_vl": 4, "qwen3_vl": 4, "gemma3": 4, "llava_med": 16}[kind]
    bos = processor.tokenizer.bos_token_id
    assert bos is None or ours.input_ids[0].tolist().count(bos) == 1
    again = processor(
        images=[[FILMS[0].convert("RGB")]], text=[render_prompt(processor)], return_tensors="pt"
    )  # how TRL's GRPO asks for token_type_ids
    assert torch.equal(again.input_ids, ours.input_ids)
    save_policy(model, processor, tmp_path / "saved")
    for text in ("the heart", render_prompt(processor)):
        new, old = (
            AutoTokenizer.from_pretrained(f)(text).input_ids for f in (tmp_path / "saved", folders[kind])
        )
        assert new == old  # saved as it came


@pytest.mark.parametrize("kind", ALL)
def test_sampling_never_writes_an_image_token(kind, folders):
    model, processor = load_policy(folders[kind])
    forbidden = list(image_tokens(model, processor))

    def urge(module, inputs, out):
        out[..., forbidden] += 50

    model.get_output_embeddings().register_forward_hook(urge)  # a model that would like to
    greedy = generate(model, processor, FILMS, max_new_tokens=6)
    sampled = [
        generate(model, processor, FILMS, max_new_tokens=12, temperature=2.0, seed=s) for s in (1, 1, 2)
    ]
    assert len(greedy) == 2 and sampled[0] == sampled[1] != sampled[2]
    inputs = processor(
        images=[[FILMS[0].convert("RGB")]],
        text=[render_prompt(processor)],
        return_tensors="pt",
        add_special_tokens=False,
    )
    written = model.generate(**inputs, max_new_tokens=12, do_sample=True)[
        0, inputs.input_ids.shape[1] :
    ]  # as any other program would
    assert not set(written.tolist()) & set(forbidden)
    model.generation_config.suppress_tokens = None
    written = model.generate(**inputs, max_new_tokens=12, do_sample=True)[0, inputs.input_ids.shape[1] :]
    assert set(written.tolist()) & set(forbidden)  # … and it does like to


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_sft_moves_language_and_projector_and_nothing_else(kind, mode, folders, tmp_path):
    data = conversations(studies(), [REPORT, "<report> clear lungs. </report>"])
    log = sft(
        folders[kind],
        data,
        tmp_path / "sft",
        mode=mode,
        epochs=3,
        batch_size=2,
        lora_r=4,
        lora_alpha=8,
        lr=1e-2,
        save_steps=1,
    )
    losses = [l["loss"] for l in log if "loss" in l]
    assert len(losses) == 3 and losses[2] < losses[0]
    (old, _), (new, _) = load_policy(folders[kind]), load_policy(tmp_path / "sft")
    found, moved = (
        groups(old),
        {n for (n, a), b in zip(old.named_parameters(), new.parameters()) if not torch.equal(a, b)},
    )
    for g, ought in dict(language=True, projector=True, vision=False).items():
        assert {n for n in found[g] if {n, f"{n}.weight"} & moved} == (set(found[g]) if ought else set()), (
            g,
            moved,
        )
    assert (mode == "full") == any("embed_tokens" in n for n in moved)


class Share:
    def score(self, candidates, references):
        return [float(len(c)) for c in candidates]


def adapter_of(trainer):
    "The adapter's parameters by name, as they are now."
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_5_vl"])  # gemma3's projector is a bare matrix
def test_stage_2_on_the_projector_alone_keeps_what_stage_1_trained(kind, folders, tmp_path):
    """`stage2_modules="projector"`: the language model's adapter is stage 1's to the end, as saved and after
    a resumed run, and the projector learns at `lr_projector`."""
    from peft import load_peft_weights

    from valor.rewards.compose import CLINICAL_SCORERS, TEXT_SCORERS
    from valor.train.grpo import Rewards, make_trainer, stage_of

    change = dict(stage2_modules="projector", lr_projector=3e-2, stage1_steps=2, stage2_steps=2)
    small = dict(group_size=2, batch_size=1, max_new_tokens=6, k_clin=2, lr=1e-2, lora_r=4, lora_alpha=8)
    cfg = preset("smoke", **small, **change, save_steps=1)
    scorers = {n: Share() for n in (*TEXT_SCORERS, *CLINICAL_SCORERS, "format")}
    similar = {2: lambda texts, rows: [float(len(t)) for t in texts]}

    def begun(stage, out, adapter=None):
        this = stage_of(cfg, stage, 0.5 * (stage - 1), 2, adapter=adapter)
        rewards = Rewards(scorers, cfg.k_clin, similarity=similar.get(stage))
        return make_trainer(folders[kind], studies(), tmp_path / out, rewards, cfg, this)

    first = begun(1, "one")
    first.train()
    first.save_model(str(tmp_path / "1"))
    second = begun(2, "two", tmp_path / "1")
    before, language = adapter_of(second), adapter_of(first)
    assert all(torch.equal(before[n], language[n]) for n in language) and len(before) > len(language)
    second.train()
    after = adapter_of(second)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved and not moved & set(language)
    rates = {group["lr"] for group in second.optimizer.param_groups if group["params"]}
    assert rates == {3e-2} and second.state.log_history[0]["kl"] > 1e-6  # the reference is SFT
    second.save_model(str(tmp_path / "2"))
    saved, own = load_peft_weights(tmp_path / "2"), load_peft_weights(tmp_path / "1")
    assert len(saved) == len(after) and all(torch.equal(saved[n], own[n]) for n in own)
    again = begun(2, "two", tmp_path / "1")
    again.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoints" / "checkpoint-1"))
    resumed = adapter_of(again)
    assert all(torch.allclose(resumed[n], after[n], atol=1e-6) for n in after)
    assert not {n for n in resumed if not torch.equal(resumed[n], before[n])} & set(language)


def test_the_projector_may_have_a_rate_of_its_own(folders, tmp_path):
    "In stage 2 with both, and in DPO, which trains what both stages together do."
    from valor.train.grpo import Rewards, Stage, make_trainer
    from valor.train.preference import pair, preference_settings, preference_trainer

    cfg = preset("smoke", lr_projector=3e-2, lora_r=4, lora_alpha=8)
    stage = Stage("language+projector", 0.0, steps=2, seed=1)
    rewards = Rewards({"format": Share()}, None)
    trainer = make_trainer(folders["llava"], studies(), tmp_path / "t", rewards, cfg, stage)
    rates = {id(p): g["lr"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
    for name, p in trainer.model.named_parameters():
        if p.requires_grad:
            assert rates.pop(id(p)) == (3e-2 if "multi_modal_projector" in name else cfg.lr)
    assert not rates
    alone = preset("smoke", stage2_modules="projector", mmedpo_noise="none", lora_r=4, lora_alpha=8)
    pairs = [pair(i, "<report> a </report>", "b", 1.0) for i in (0, 1)]
    settings = preference_settings(tmp_path / "dpo", alone, steps=1, seed=0)
    data = studies().add_column("truth", [[], []])
    trainer = preference_trainer(folders["llava"], pairs, data, settings, alone, weighted=False)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("language_model" in n for n in trained) and any("projector" in n for n in trained)


@pytest.mark.parametrize("kind", ALL)
def test_both_stages_of_grpo_merge_and_reload(kind, folders, tmp_path):
    from peft import PeftModel

    from valor.cli import main
    from valor.policy.generate import merge
    from valor.rewards.compose import CLINICAL_SCORERS, TEXT_SCORERS
    from valor.train.grpo import Rewards, Stage, make_trainer

    cfg = preset(
        "smoke", group_size=2, batch_size=1, max_new_tokens=6, k_clin=2, lr=1e-2, lora_r=4, lora_alpha=8
    )
    scorers = {n: Share() for n in (*TEXT_SCORERS, *CLINICAL_SCORERS, "format")}
    ended = {}  # the trained weights at the end of stage 1
    for stage, (modules, adapter) in enumerate(
        (("language", None), ("language+projector", tmp_path / "1")), 1
    ):
        rewards = Rewards(
            scorers,
            cfg.k_clin,
            similarity=(lambda texts, rows: [float(len(t)) for t in texts]) if stage == 2 else None,
        )
        trainer = make_trainer(
            folders[kind],
            studies(),
            tmp_path / f"t{stage}",
            rewards,
            cfg,
            Stage(modules, 0.5 * (stage - 1), steps=2, seed=stage, adapter=adapter),
        )
        forbidden = set(image_tokens(trainer.model, trainer.processing_class))
        started = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        if stage == 2:
            assert all(torch.equal(ended[n], started[n]) for n in ended)
            assert len(started) > len(ended)  # stage 1's weights, and more
        seen, go = [], trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda inputs: seen.append(go(inputs)) or seen[-1]
        trainer.train()
        line = next(l for l in trainer.state.log_history if "k" in l)
        assert np.isfinite(line["loss"]) and not forbidden & set(seen[0]["completion_ids"].flatten().tolist())
        if stage == 1:
            assert abs(line["kl"]) < 1e-5  # a fresh adapter is the reference
        else:
            assert line["kl"] > 1e-6  # the reference is still the policy before stage 1
        ended = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        moved = {n for n in ended if not torch.equal(ended[n], started[n])}
        assert moved and all("lora_" in n for n in ended)
        if stage == 2:
            assert any(not re.search("language_model|text_model", n) for n in moved)
        trainer.save_model(str(tmp_path / str(stage)))
    merge(folders[kind], tmp_path / "2", tmp_path / "merged")
    model, processor = load_policy(folders[kind])
    plain = PeftModel.from_pretrained(model, tmp_path / "2").eval()
    want, have, base = run(plain, processor), logits(tmp_path / "merged"), logits(folders[kind])
    assert torch.allclose(want, have, atol=1e-4) and not torch.allclose(base, have, atol=1e-3)
    (tmp_path / "films").mkdir()
    for i, film in enumerate(FILMS):
        film.save(tmp_path / "films" / f"{i}.png")
    main(
        [
            "generate",
            "--model",
            str(tmp_path / "merged"),
            "--images",
            str(tmp_path / "films"),
            "--out",
            str(tmp_path / "r.jsonl"),
            "--max-new-tokens",
            "5",
        ]
    )
    assert [json.loads(l)["id"] for l in (tmp_path / "r.jsonl").read_text().splitlines()] == [
        "0.png",
        "1.png",
    ]


def test_a_family_is_added_by_one_registration(tmp_path):
    "The example of docs/adding-your-own.md, of at most ten lines: loaded, adapted, tuned and sampled from."
    section = ADDING.read_text(encoding="utf-8").split("## A model family")[1]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 10
    with patch.dict(KINDS):
        exec(example, {})
        folder = miniature_policy("vipllava", tmp_path / "base", [REPORT])
    data = conversations(studies(), [REPORT] * 2)
    log = sft(folder, data, tmp_path / "sft", mode="lora", epochs=3, batch_size=2, lora_r=4, lr=1e-2)
    losses = [update["loss"] for update in log if "loss" in update]
    assert losses[-1] < losses[0]
    model, processor = load_policy(tmp_path / "sft")
    assert type(model).__name__ == "VipLlavaForConditionalGeneration"
    assert len(generate(model, processor, FILMS, max_new_tokens=4)) == len(FILMS)
    with pytest.raises(ValueError, match="kind='vipllava': expected one of llava, qwen2_5_vl"):
        miniature_policy("vipllava", tmp_path / "again")


@pytest.fixture
def copy(folders, tmp_path):
    def make(kind, name="copy"):
        return shutil.copytree(folders[kind], tmp_path / name)

    return make


def refused(path, **how):
    with pytest.raises(ValueError) as e:
        load_policy(path, **how)
    assert "\n" not in str(e.value), e.value
    return str(e.value)


def text_only(folder):
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        )
    ).save_pretrained(folder)
    return folder


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_architectures_are_named_with_the_remedy(tmp_path, folders):
    assert "model_type='llama' reads no images and writes text" in refused(text_only(tmp_path / "text"))
    assert "run valor convert-llava-med" in refused(folders["llava_med"].parent / "original")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "it holds an adapter" in refused(tmp_path / "empty")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text(json.dumps(dict(model_type="not_yet_known")))
    assert "not_yet_known" in refused(tmp_path / "new")


def test_missing_and_truncated_shards(copy):
    folder = copy("qwen2_5_vl", "sharded")
    load_policy(folder)[0].save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_policy(folder)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    assert shards[1].name in (said := refused(folder)) and "truncated" in said
    shards[1].write_bytes(b"")
    assert shards[1].name in (said := refused(folder)) and "truncated" in said
    tensors = load_file(shards[2])
    lost = sorted(tensors)[0]
    shards[1].write_bytes(whole)
    save_file({k: v for k, v in tensors.items() if k != lost}, shards[2])
    assert f"no tensor {lost}" in refused(folder)
    shards[1].unlink()
    assert f"{shards[1].name}: no such file" in refused(folder)
    one = copy("gemma3", "one")
    tensors = load_file(one / "model.safetensors")
    lost = next(k for k in tensors if "projection_weight" in k)
    save_file(
        {k: v for k, v in tensors.items() if k != lost}, one / "model.safetensors", metadata=dict(format="pt")
    )
    assert "1 weights are missing, such as" in refused(one)
    (one / "model.safetensors").unlink()
    assert "no weights in it" in refused(one)


def test_processors_that_cannot_show_an_image(copy):
    folder = copy("llava", "untemplated")
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in refused(folder)
    folder = copy("llava", "blind")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    assert "chat template writes no image token '<image>'" in refused(folder)
    folder = copy("llava", "bare")
    (folder / "processor_config.json").unlink()
    assert "processor" in refused(folder)
    folder = copy("llava", "moved")
    edited(folder / "config.json", image_token_index=5, image_token_id=5)
    assert "gives image token '<image>' the id" in refused(folder)
    folder = copy("qwen3_vl", "wordless")
    text = (folder / "tokenizer.json").read_text().replace("<|image_pad|>", "<|other_pad|>")
    (folder / "tokenizer.json").write_text(text)
    assert "no image token '<|image_pad|>'" in refused(folder)


def test_adapters_for_another_base(folders, tmp_path):
    from peft import get_peft_model

    from valor.policy.generate import merge

    for kind in ("qwen2_5_vl", "gemma3"):
        model = load_policy(folders[kind])[0]
        get_peft_model(model, lora_config(model, "language+projector", 4, 8)).save_pretrained(tmp_path / kind)
    for base, adapter in (("gemma3", "qwen2_5_vl"), ("qwen2_5_vl", "gemma3"), ("llava", "gemma3")):
        with pytest.raises(ValueError, match="made for another base"):
            merge(folders[base], tmp_path / adapter, tmp_path / "no")
    wide = miniature_policy("gemma3", tmp_path / "wide", width=64)
    with pytest.raises(ValueError, match="made for another base"):
        merge(wide, tmp_path / "gemma3", tmp_path / "no")
    with pytest.raises(ValueError, match="no adapter_config.json"):
        merge(folders["llava"], folders["llava"], tmp_path / "no")
    assert not list(tmp_path.glob("no*"))


def test_an_image_token_in_a_report_is_one_line(folders, tmp_path):
    with pytest.raises(ValueError, match=r"completion 1: .*image token <\|vision_start\|>"):
        sft(
            folders["qwen3_vl"],
            conversations(studies(), [REPORT, "see <|vision_start|>"]),
            tmp_path / "out",
            mode="lora",
        )
    assert not (tmp_path / "out").exists()


def test_out_of_memory_names_what_to_lower(folders, tmp_path, monkeypatch, capsys):
    from valor.cli import main

    def full(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …\nmore")

    model, processor = load_policy(folders["llava"])
    monkeypatch.setattr(type(model), "forward", functools.wraps(type(model).forward)(full))
    monkeypatch.setattr("valor.train.sft.ResumableSFT.training_step", full)
    for job in (
        lambda: generate(model, processor, FILMS, max_new_tokens=4),
        lambda: sft(
            folders["llava"],
            conversations(studies(), [REPORT] * 2),
            tmp_path / "out",
            mode="lora",
            batch_size=2,
        ),
    ):
        with pytest.raises(MemoryError, match="out of memory .CUDA out of memory.*batch_size=") as e:
            job()
        assert "\n" not in str(e.value)
    FILMS[0].save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="^valor: .*lower one of batch_size=8, max_new_tokens=256"):
        main(
            [
                "generate",
                "--model",
                str(folders["llava"]),
                "--images",
                str(tmp_path / "a.png"),
                "--out",
                str(tmp_path / "r.jsonl"),
            ]
        )
    assert (tmp_path / "r.jsonl").read_text() == ""


def test_ways_of_loading(folders, monkeypatch, tmp_path):
    model, _ = load_policy(folders["llava"], **frozen_weights("bfloat16"), attention="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert "attention='flash_attention_9'" in refused(folders["llava"], attention="flash_attention_9")
    monkeypatch.setattr("valor.policy.models.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="bitsandbytes is not installed; expected it .pip install 'valor"):
        frozen_weights("nf4")
    code = tmp_path / "code"
    shutil.copytree(folders["llava"], code)
    edited(code / "config.json", model_type="brings_code", auto_map=dict(AutoConfig="evil.Config"))
    (code / "evil.py").write_text("raise SystemExit('code from a checkpoint has run')")
    assert "trust_remote_code" in refused(code)  # … and it has not run


def test_four_bits(folders, tmp_path):
    """QLoRA on a CPU: the base stays in four bits while the adapter trains, the result is the full base
    with the adapter merged."""
    pytest.importorskip("bitsandbytes")
    import bitsandbytes as bnb

    model, processor = load_policy(folders["llava"], **frozen_weights("nf4"))
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) and {
        g: len(n) for g, n in groups(model).items()
    } == {g: len(n) for g, n in groups(load_policy(folders["llava"])[0]).items()}
    data = conversations(studies(), [REPORT] * 2)
    log = sft(
        folders["llava"],
        data,
        tmp_path / "sft",
        mode="lora",
        epochs=3,
        batch_size=2,
        lora_r=4,
        lora_alpha=8,
        lr=1e-2,
        weights="nf4",
    )
    losses = [l["loss"] for l in log if "loss" in l]
    assert losses[-1] < losses[0]
    trained, _ = load_policy(tmp_path / "sft")
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in trained.modules())
    same = [
        torch.equal(a.bfloat16(), b.bfloat16())
        for (n, a), b in zip(load_policy(folders["llava"])[0].named_parameters(), trained.parameters())
        if "embed_tokens" in n
    ]
    assert all(same)


def test_the_main_job_on_a_qwen(folders, tmp_path, monkeypatch, capsys):
    "base=FOLDER: SFT, both stages, evaluation and tables, with nothing but settings."
    from valor.cli import main

    monkeypatch.setenv("VALOR_RUNS", str(tmp_path / "runs"))
    settings = dict(
        base=folders["qwen2_5_vl"],
        sft_mode="lora",
        n_train=4,
        n_val=1,
        n_test=4,
        expert_steps=1,
        stage1_steps=1,
        stage2_steps=1,
        sft_epochs=1,
        batch_size=1,
        group_size=2,
        max_new_tokens=4,
        lora_r=2,
        lora_alpha=4,
        n_boot=10,
        threads=1,
        k_clin=1,
        attention="eager",
    )
    main(["run", "--preset", "smoke", *(a for k, v in settings.items() for a in ("--set", f"{k}={v}"))])
    out = capsys.readouterr().out
    assert "VALOR w/o visual" in out and (tmp_path / "runs" / "results").exists()
    with pytest.raises(SystemExit, match="reads no images and writes text"):
        main(
            [
                "run",
                "--preset",
                "smoke",
                "--set",
                f"base={text_only(tmp_path / 'text')}",
                "--set",
                "sft_mode=lora",
            ]
        )
