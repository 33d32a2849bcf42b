"""Attention of finding words: known attention comes out where it was put, the variants equal their
definitions, Qwen2.5-VL's and Gemma 3's grids lie as they should, and the measures' properties."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaImageProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from valor.data.phantom import make_phantom, parse_report
from valor.policy.tiny import build_policy, build_tokenizer
from valor.results import attention as at

DATA = make_phantom(6, 3, "test")
REPORTS = [f"<report> {r} </report>" for r in DATA["report"]]


@pytest.fixture(scope="module")
def policy():
    model, processor = build_policy(REPORTS, seed=1)
    return model.eval(), processor


def batch(policy, n=6):
    "Inputs of the first `n` studies with a mention, and their mentions' rows."
    model, processor = policy
    chosen = [i for i, r in enumerate(REPORTS[:n]) if at.mentions_of_findings(r)]
    inputs, spans = at.teacher_inputs(
        processor, [DATA[i]["image"] for i in chosen], [REPORTS[i] for i in chosen]
    )
    return (
        inputs,
        [[at.rows_for(s, m) for m in at.mentions_of_findings(REPORTS[i])] for i, s in zip(chosen, spans)],
        chosen,
    )


# --- mentions


def test_mentions_state_what_the_parser_reads():
    for report in REPORTS:
        assert {m.what for m in at.mentions_of_findings(report)} == {f.what for f in parse_report(report)}
    for row, report in zip(DATA, REPORTS):
        for m in at.mentions_of_findings(report):
            assert at.boxes_of(m.what, row["truth"]), "a reference states what is there"


def test_denials_are_left_out():
    assert (
        at.mentions_of_findings("no pneumothorax. there is no effusion.")
        == []
        == at.observed("no pneumothorax. there is no effusion.")
    )


# --- attention


def looking_policy(cells):
    """A policy whose first layer's first head looks, from any word, at the one image token that `cells`
    names for each study."""
    model, processor = build_policy(REPORTS, seed=1)
    model.eval()
    head = 32
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()[:, 1] = 1  # a word is e1
        layer = model.get_decoder().layers[0].self_attn
        layer.q_proj.weight.zero_()
        layer.k_proj.weight.zero_()
        layer.q_proj.weight[head // 2 - 1, 1] = (
            1.0  # the slowest pair of rotary dimensions: distance hardly matters
        )
        layer.k_proj.weight[head // 2 - 1, 0] = 1.0

    def features(module, args, out):
        seen = torch.zeros_like(out)
        seen[..., 2] = 1  # an image token is e2, the one to be looked at e0
        for b, cell in enumerate(cells):
            seen[b, cell, :3] = torch.tensor([1.0, 0, 0])
        return seen

    model.model.multi_modal_projector.register_forward_hook(features)
    return model, processor


def test_known_attention_comes_out_where_it_was_put():
    cells = [0, 35, 17]
    model, processor = looking_policy(cells)
    chosen = [i for i, r in enumerate(REPORTS) if at.mentions_of_findings(r)][:3]
    frame, maps = at.attention_maps(
        model,
        processor,
        [DATA[i]["image"] for i in chosen],
        [REPORTS[i] for i in chosen],
        layers=[0],
        heads=[0],
    )
    assert set(frame.row) == {0, 1, 2}
    for row, heat in zip(frame.row, maps):
        y, x = divmod(cells[row], 6)
        box = [x / 6, y / 6, (x + 1) / 6, (y + 1) / 6]
        assert np.isclose(at.pointing(heat, at.inside([box])), 1) and at.energy(heat, at.inside([box])) > 0.98
    assert (frame["image share"] > 0.98).all() and (frame.cells == "6x6").all()
    others = at.attention_maps(
        model,
        processor,
        [DATA[i]["image"] for i in chosen],
        [REPORTS[i] for i in chosen],
        layers=[0],
        heads=[1],
    )[1]
    assert np.allclose(others, 1 / 96**2, rtol=1e-4)  # zero queries: uniform


def test_variants_equal_their_definitions(policy):
    model = policy[0]
    inputs, rows, _ = batch(policy)
    ours = {v: at.token_attention(model, inputs, rows, v) for v in at.VARIANTS}
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True)
    model.set_attn_implementation("sdpa")
    flow = torch.eye(inputs.input_ids.shape[1])
    for a in out.attentions:
        flow = (a.mean(1) + torch.eye(a.shape[-1])) / 2 @ flow
    for b, each in enumerate(rows):
        for k, r in enumerate(each):
            assert torch.allclose(
                ours["raw"][b][k], torch.stack(out.attentions).mean((0, 2))[b, r].mean(0), atol=1e-6
            )
            assert torch.allclose(ours["rollout"][b][k], flow[b, r].mean(0), atol=1e-6)
            logp = out.logits[b].log_softmax(-1)[r, inputs.input_ids[b, r + 1]].sum()
            grads = torch.autograd.grad(logp, out.attentions, retain_graph=True)
            want = (
                torch.stack([(a * g).relu() for a, g in zip(out.attentions, grads)])
                .mean((0, 2))[b, r]
                .mean(0)
            )
            assert torch.allclose(ours["gradient"][b][k], want, atol=1e-7)


def test_a_frozen_model_has_gradients_and_is_left_as_it_was(policy):
    model = policy[0]
    inputs, rows, _ = batch(policy, 3)
    want = at.token_attention(model, inputs, rows, "gradient")
    hooks = sum(len(m._forward_hooks) for m in model.modules())  # transformers has some of its own
    model.requires_grad_(False).train()
    got = at.token_attention(model, inputs, rows, "gradient")
    assert (
        model.training
        and model.config.text_config._attn_implementation == "sdpa"
        and hooks == sum(len(m._forward_hooks) for m in model.modules())
    )
    model.requires_grad_(True).eval()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(want, got)) and all(
        p.grad is None for p in model.parameters()
    )


def test_the_batch_does_not_matter(policy):
    images = [r["image"] for r in DATA]
    for variant in at.VARIANTS:
        (a, many), (b, one) = [
            at.attention_maps(*policy, images, REPORTS, variant=variant, batch_size=n) for n in (6, 1)
        ]
        assert a.drop(columns="image share").equals(b.drop(columns="image share")) and np.allclose(
            many, one, atol=1e-6
        )


def test_two_images_give_the_map_of_the_first(policy):
    images = [[r["image"], r["image"]] for r in DATA][:3]
    frame, maps = at.attention_maps(*policy, images, REPORTS[:3])
    assert (frame.cells == "6x6").all() and len(maps) == len(frame) > 0


def test_reports_without_mentions():
    frame, maps = at.attention_maps(None, None, [None] * 2, ["", "no effusion."])
    assert len(frame) == 0 and maps.shape == (0, 96, 96)
    scored = at.score(frame, maps, DATA)
    assert (
        len(scored) == 0 == len(scored[scored.present])
        and "what" in scored[scored.present]
        and np.isnan(at.estimate({0: scored}, "energy", DATA["study_id"], 20)[0])
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(variant="mean"), "variant='mean' is unknown; expected one of raw, rollout, gradient"),
        (dict(layers=0), "layers=0 is not allowed; expected 'all', a number from 1 to 3"),
        (dict(layers=[3]), r"layers=\[3\] is not allowed"),
        (dict(layers=[]), r"layers=\[\] is not allowed"),
        (dict(layers=True), "layers=True is not allowed"),
        (dict(heads="first"), "heads='first' is not allowed; expected 'all', a number from 1 to 4"),
    ],
)
def test_bad_choices_are_named(policy, change, says):
    with pytest.raises(ValueError, match=says):
        at.attention_maps(*policy, [DATA[0]["image"]], ["small left effusion."], **change)


def test_tokens_that_make_no_grid_are_named(policy):
    model, processor = policy
    inputs, _ = at.teacher_inputs(processor, [DATA[0]["image"]], ["effusion."])
    inputs["input_ids"][0, -1] = model.config.image_token_id
    with pytest.raises(ValueError, match="37 image tokens for 1 image.* expected a square grid"):
        at.token_grid(model, inputs, [1])


# --- other architectures, fabricated from their configurations


def qwen():
    specials = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = build_tokenizer(REPORTS)
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.image_token, tokenizer.video_token = specials[:2]
    template = (
        "{% for m in messages %}<s>{% for c in m['content'] %}{% if c['type'] == 'image' "
        "%}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% "
        "endfor %}"
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 20}),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=template,
    )
    ids = {
        f"{n}_token_id": tokenizer.convert_tokens_to_ids(t)
        for n, t in zip(("image", "video", "vision_start", "vision_end"), specials)
    }
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
            **{k: v for k, v in ids.items() if "image" not in k and "video" not in k},
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=64,
            fullatt_block_indexes=[1],
        ),
        **ids,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval(), processor


def test_qwen_grids_lie_as_the_image_does():
    model, processor = qwen()
    images = [
        Image.new("L", (140, 84), 90),
        Image.new("L", (84, 112), 90),
    ]  # 5 × 3 and 3 × 4 tokens of 28 pixels
    reports = ["findings: small left effusion.", "findings: nodule in the right upper lobe. cardiomegaly."]
    for variant in at.VARIANTS:
        frame, maps = at.attention_maps(model, processor, images, reports, variant=variant, size=60)
        assert frame.cells.tolist() == ["3x5", "4x3", "4x3"] and np.allclose(maps.sum((1, 2)), 1, atol=1e-4)
        assert np.allclose(
            maps[0], np.kron(maps[0][::20, ::12], np.ones((20, 12))), rtol=1e-4
        )  # cells of 20 × 12 pixels of 60 × 60
    inputs, spans = at.teacher_inputs(processor, images, reports)
    for b, (positions, (h, w)) in enumerate(at.token_grid(model, inputs, [1, 1])):
        assert len(positions) == h * w == (inputs.input_ids[b] == model.config.image_token_id).sum()
    flow = at.token_attention(
        model,
        inputs,
        [[at.rows_for(spans[0], at.mentions_of_findings(reports[0])[0])], []][:1]
        + [[at.rows_for(spans[1], m) for m in at.mentions_of_findings(reports[1])]],
    )
    positions = at.token_grid(model, inputs, [1, 1])[0][0]
    frame, maps = at.attention_maps(model, processor, images, reports, size=60)
    cells = flow[0][0, positions].reshape(3, 5).numpy()  # row by row
    assert np.allclose(maps[0][10::20, 6::12] * 60 * 60 / 15, cells / cells.sum(), rtol=1e-3)


def gemma():
    names = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    tokenizer = build_tokenizer(REPORTS)
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
    for name, token in names.items():
        setattr(tokenizer, name, token)
    tokenizer.image_token_id, tokenizer.boi_token_id, tokenizer.eoi_token_id = (
        tokenizer.convert_tokens_to_ids([names[n] for n in ("image_token", "boi_token", "eoi_token")])
    )
    template = (
        "{% for m in messages %}<s>{% for c in m['content'] %}{% if c['type'] == 'image' "
        "%}<start_of_image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size=dict(height=64, width=64)),
        tokenizer,
        chat_template=template,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=512,
        ),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
        ),
        mm_tokens_per_image=16,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return Gemma3ForConditionalGeneration(config).eval(), processor


def test_gemma_has_a_square_grid():
    model, processor = gemma()
    for variant in at.VARIANTS:
        frame, maps = at.attention_maps(
            model,
            processor,
            [Image.new("L", (80, 60), 90)] * 2,
            ["small left effusion.", "nodule. cardiomegaly."],
            variant=variant,
        )
        assert (frame.cells == "4x4").all() and len(maps) == 3 and np.isfinite(maps).all()


# --- geometry: what real processors do to a mark in the image is undone


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessor(size=dict(height=96, width=96), do_center_crop=False),
        CLIPImageProcessor(size=dict(shortest_edge=96), crop_size=dict(height=96, width=96)),
        LlavaImageProcessor(do_pad=True, size=dict(shortest_edge=96), crop_size=dict(height=96, width=96)),
    ],
    ids=["stretched", "cropped", "padded"],
)
@pytest.mark.parametrize("size", [(96, 96), (300, 200), (160, 240)])
def test_a_mark_in_the_image_is_found_again(processor, size):
    w, h = size
    pixels = np.zeros((h, w), np.uint8)
    cx, cy = 0.4, 0.55
    pixels[int(cy * h) - 12 : int(cy * h) + 12, int(cx * w) - 12 : int(cx * w) + 12] = 255
    seen = np.asarray(
        processor(
            Image.fromarray(pixels).convert("RGB"), return_tensors="pt", do_normalize=False
        ).pixel_values[0, 0],
        float,
    )
    if getattr(processor, "do_pad", False) and w != h:
        seen[seen < 0.9] = 0  # the padding is grey
    heat = at.to_image(seen.reshape(24, 4, 24, 4).sum((1, 3)), at.extent_of(processor, size), 120)
    mass, axis = heat / heat.sum(), (np.arange(120) + 0.5) / 120
    assert abs(mass.sum(0) @ axis - cx) < 0.015 and abs(mass.sum(1) @ axis - cy) < 0.015


# --- measures

unit, grids = st.floats(0, 1), st.integers(2, 9)
boxes = st.tuples(unit, unit, unit, unit).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@settings(max_examples=60, deadline=None)
@given(boxes, st.integers(3, 40))
def test_a_uniform_map_scores_the_share_of_the_area(box, size):
    area, mask = (box[2] - box[0]) * (box[3] - box[1]), at.inside([box], size)
    for heat in (np.ones((size, size)), np.zeros((size, size))):
        assert np.isclose(at.energy(heat, mask), area) and np.isclose(at.pointing(heat, mask), area)
    if area > 1e-6:
        assert np.isclose(at.energy(mask, mask), (mask**2).sum() / mask.sum())


@settings(max_examples=60, deadline=None)
@given(grids, grids, st.data())
def test_a_perfect_map_scores_one(x, y, data):
    size = 10
    mask = at.inside(
        [
            (
                min(x, 8) / size,
                min(y, 8) / size,
                data.draw(st.integers(min(x, 8) + 1, 10)) / size,
                data.draw(st.integers(min(y, 8) + 1, 10)) / size,
            )
        ],
        size,
    )
    assert np.isclose(at.energy(mask, mask), 1) and np.isclose(at.pointing(mask, mask), 1)
    assert np.isclose(at.energy(1 - mask, mask), 0) or mask.all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.integers(-3, 3), st.integers(-3, 3))
def test_scale_and_place_do_not_matter(seed, scale, dx, dy):
    rng = np.random.default_rng(seed)
    heat, box = np.zeros((12, 12)), np.array([4, 3, 7, 8]) / 12
    heat[3:9, 3:9] = rng.exponential(size=(6, 6))
    moved, there = np.roll(heat, (dy, dx), (0, 1)), box + np.array([dx, dy, dx, dy]) / 12
    for f in (at.energy, at.pointing):
        assert np.isclose(f(heat, at.inside([box], 12)), f(scale * moved, at.inside([there], 12)), atol=1e-9)
    assert np.isclose(at.half(heat), at.half(scale * moved))


def test_half_and_random_maps():
    rng = np.random.default_rng(0)
    one = np.zeros((10, 10))
    one[2, 3] = 5
    assert at.half(one) == 0.01 and at.half(np.ones((10, 10))) == 0.5
    mask = at.inside(
        [(0.2, 0.3, 0.6, 0.8)], 12
    )  # a random map points and weighs, on average, as the uniform one
    heat = np.kron(rng.exponential(size=(4000, 6, 6)), np.ones((2, 2)))
    assert abs(at.pointing(heat, mask).mean() - 0.2) < 0.02 and abs(at.energy(heat, mask).mean() - 0.2) < 0.01


def test_tolerance_and_union():
    one = np.zeros((10, 10))
    one[0, 0] = 1
    assert at.pointing(one, at.inside([(0.1, 0.1, 0.3, 0.3)], 10)) == 0 and np.isclose(
        at.pointing(one, at.inside([(0.1, 0.1, 0.3, 0.3)], 10, 0.1)), 1
    )
    assert np.isclose(at.inside([(0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5)], 8).mean(), 0.375)


# --- scores and intervals


def test_scores_against_own_and_another_studys_box():
    truth = [[dict(name="nodule", kind=None, box=b)] for b in ([0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1])] + [[]]
    data = dict(truth=truth, study_id=["a", "b", "c"])
    frame = pd.DataFrame(dict(row=[0, 1, 2, 0], what=["nodule", "nodule", "nodule", "edema"], cells="2x2"))
    maps = np.stack(
        [at.inside([b], 8) for b in ([0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1])]
    )
    scored = at.score(frame, maps, data, tolerance=0)
    assert scored.present.tolist() == [True, True, False, False] and scored.energy.tolist() == [1, 1, 0, 0]
    assert (
        scored["energy, other's box"].iloc[:2].tolist() == [0, 0]
        and scored["energy, other's box"].iloc[2:].isna().all()
    )
    value, lo, hi = at.estimate({0: scored[scored.present]}, "energy", data["study_id"], 50)
    assert value == lo == hi == 1
    assert at.estimate({0: scored}, "energy", data["study_id"], 200)[0] == 0.5


def test_controls_are_scored_at_the_same_mentions(policy):
    frame, maps = at.attention_maps(*policy, [r["image"] for r in DATA], REPORTS)
    scored = at.score(frame, maps, DATA)
    masks = np.stack([at.inside(at.boxes_of(w, DATA[r]["truth"])) for r, w in zip(frame.row, frame.what)])
    controls = at.control_maps(
        scored, masks, at.usual_places(make_phantom(30, 0, "train")["truth"], frame.what)
    )
    assert set(controls) == {"uniform", "random", "centred", "usual place", "best cells"} and all(
        m.shape == maps.shape for m in controls.values()
    )
    assert np.allclose(at.energy(controls["uniform"], masks), masks.mean((1, 2)))
    for m in (maps, controls["random"], controls["uniform"]):
        assert (at.pointing(controls["best cells"], masks) >= at.pointing(m, masks) - 1e-6).all()


def test_a_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(0)
    ids = [f"s{i}" for i in range(60)]
    a = pd.DataFrame(dict(study_id=ids, energy=rng.random(60)))
    frames = {"a": {0: a}, "b": {0: a.assign(energy=a.energy + 0.01 * rng.random(60))}}
    gap, lo, hi = at.difference(frames, "b", "a", "energy", ids, 200)
    _, low, high = at.estimate(frames["a"], "energy", ids, 200)
    assert 0 < lo < gap < hi and hi - lo < (high - low) / 5


def test_maps_are_written_for_the_gallery(tmp_path):
    frame = pd.DataFrame(dict(row=[0, 0, 2]))
    maps = np.stack(
        [np.full((4, 4), 1 / 16), at._unit(at.inside([(0, 0, 0.5, 0.5)], 4)), np.zeros((4, 4))]
    ).astype(np.float32)
    paths = at.write_maps(tmp_path / "VALOR", frame, maps, ["a", "b", "c"], "phantom")
    assert [p.name for p in paths] == ["a.npy", "c.npy"] and np.load(paths[0]).dtype == np.float32
    assert np.isclose(np.load(paths[0])[0, 0], (1 / 16 + 1 / 4) / 2) and np.load(paths[1]).sum() == 0
