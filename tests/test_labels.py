"""CheXbert with made-up weights in the true format.

Its labels equal the package's at every batch size; which texts reach the model; the messages for wrong files;
and properties of the label score."""

import os
import random
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import classification_report
from transformers import AutoTokenizer, BertTokenizer

from valor.metrics.conventions import CONVENTIONS, convention_columns, label_f1
from valor.rewards.chexbert import (
    FILE,
    FIVE,
    UNCERTAIN,
    CheXbert,
    LabelF1,
    mentions,
)
from valor.rewards.rules import report_labels
from valor.rewards.text import minilm_folder, scorer
from valor.testing import miniature_chexbert, package_chexbert
from valor.vocabulary import OBSERVATIONS

WORDS = (
    "the heart is enlarged no pleural effusion . , or small left right nodule in upper lobe lungs are clear "
    "possible pneumonia edema not seen picc"
).split()
ODD = [
    "",
    " ",
    "\n\t\x0b\u2028",
    "\x00\x1b[31m red \x07",
    "气胸 左侧 心臓",
    "ÉPANCHEMENT pleural ß ﬁ",
    "[SEP] no [MASK] effusion [CLS][PAD]",
    "two\n\n lines \t here\xa0now",
    "don't 5.3mm x-ray!! 1.2.3",
    "a" * 300,
    "🫀 \u200b\u00ad",
    "effusion " * 800,
    "no " * 10_000,
    "the heart is normal . " * 102 + "x y",
]  # the last one has 512 tokens and a few more


def made_up(n=72, seed=0):
    "Reports of 0 to 400 words, and the odd ones."
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=int(400 * rng.random() ** 3))) for _ in range(n - len(ODD))] + ODD


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return miniature_chexbert(tmp_path_factory.mktemp("chexbert"))


@pytest.fixture(scope="module")
def state(weights):
    return torch.load(weights, weights_only=True)


def berts_tokenizer():
    "bert-base-uncased's tokenizer: its class with its defaults and the vocabulary that MiniLM shares."
    return BertTokenizer(vocab=AutoTokenizer.from_pretrained(minilm_folder()).get_vocab())


def test_labels_equal_the_package_at_batch_sizes_1_8_and_32(weights):
    reports, ours = made_up(), CheXbert(weights, device="cpu")
    judge = package_chexbert(weights, berts_tokenizer())
    with torch.no_grad():
        package = {mode: [judge.get_label(r, mode) for r in reports] for mode in ("classification", "rrg")}
    assert list(F1_names()) == OBSERVATIONS
    for ours.batch_size in (1, 8, 32):
        rows = ours.classes(reports)
        assert [[{0: "", 1: 1, 2: 0, 3: -1}[c] for c in row] for row in rows] == package["classification"]
        assert [[int(c in (1, 3)) for c in row] for row in rows] == package["rrg"]
    assert {c for row in rows for c in row[:13]} == {0, 1, 2, 3} and {row[13] for row in rows} == {0, 1}
    assert (
        len({tuple(row) for row in rows}) > len(reports) / 2
    )  # the texts are told apart, so equality says something
    counted = LabelF1(weights, device="cpu")
    assert counted.labels(reports).fillna("").values.tolist() == package["classification"]
    again = classification_report(
        *(np.array(package["rrg"])[order] for order in (slice(None, None, -1), slice(None))),
        target_names=OBSERVATIONS,
        output_dict=True,
        zero_division=0,
    )
    sums = summed(counted.labels(reports), counted.labels(reports[::-1]))
    for average in ("micro", "macro"):
        f1 = label_f1(sums, CONVENTIONS["radeval"], average, 14)
        assert f1 == pytest.approx(again[f"{average} avg"]["f1-score"], abs=1e-12)


def summed(said, true):
    "What `label_f1` counts by, from the labels of both sides."
    return dict(convention_columns(said, true).sum(), studies=len(said))


def F1_names():
    "The package's own order of its 14 heads, out of its constructor's source."
    import ast
    import inspect

    from f1chexbert import f1chexbert

    for node in ast.walk(ast.parse(inspect.getsource(f1chexbert))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self.target_names":
            return ast.literal_eval(node.value)


def test_tokens_are_the_package_s(weights):
    import f1chexbert.f1chexbert as package

    judge = package_chexbert(weights, berts_tokenizer())
    theirs = package.tokenize(pd.Series(made_up()), judge.tokenizer)
    ours, seen = CheXbert(weights, batch_size=1, device="cpu"), []
    hook = ours.model.bert.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0][0].tolist()), with_kwargs=True
    )
    for report in made_up():
        ours.classes([report])
    hook.remove()
    assert (
        seen == theirs
        and max(map(len, seen)) == 512
        and all(ids[-1] == judge.tokenizer.sep_token_id for ids in seen)
    )


def test_no_call_leaves_this_machine(weights, monkeypatch):
    def call(*a, **k):
        raise AssertionError("a network call")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, call)
    monkeypatch.setattr(socket, "getaddrinfo", call)
    assert scorer("chexbert", model=str(weights.parent), device="cpu").score(
        ["small effusion ."], ["small effusion ."]
    ) == [1.0]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "2020's format"])
def test_both_file_formats_and_an_adam_state_load_with_weights_only(weights, state, tmp_path, zipped):
    layer = torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(layer.parameters(), lr=2e-5)
    layer(torch.ones(1, 2)).sum().backward()
    adam.step()
    torch.save(
        state | {"epoch": 8, "optimizer_state_dict": adam.state_dict()},
        tmp_path / FILE,
        _use_new_zipfile_serialization=zipped,
    )
    reports = made_up(24)
    assert CheXbert(tmp_path / FILE, device="cpu").classes(reports) == CheXbert(
        weights, device="cpu"
    ).classes(reports)
    assert any("position_ids" in name for name in state["model_state_dict"])


def test_the_checkpoint_s_own_config_and_vocabulary_are_used(weights, tmp_path):
    (tmp_path / FILE).symlink_to(weights)
    plain = CheXbert(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    four = CheXbert(tmp_path, device="cpu")
    words = sorted((v := AutoTokenizer.from_pretrained(minilm_folder()).get_vocab()), key=v.get)
    (tmp_path / "vocab.txt").write_text("\n".join(words[:1000] + words[1000:][::-1]))
    own = CheXbert(tmp_path, device="cpu")
    assert len({tuple(map(tuple, c.classes(made_up(30)))) for c in (plain, four, own)}) == 3
    assert (
        len({c.key for c in (plain, four, own, CheXbert(tmp_path, "bfloat16", device="cpu"))}) == 4
    )  # no analysis of one passes for another's


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_mostly_agrees(weights, dtype):
    full, half = (np.array(CheXbert(weights, d, device="cpu").classes(made_up())) for d in ("float32", dtype))
    assert (full == half).mean() > 0.9


COUNT = """import sys
from valor.rewards.chexbert import LabelF1
judge = LabelF1(sys.argv[1], cache=sys.argv[2], device="cpu")
judge.score(["one more candidate"] * 64, [f"study {i // 8} small effusion ." for i in range(64)])
print("sent", judge.sent)"""


@pytest.mark.parametrize("duplicates", [0, 10, 19])
def test_only_what_is_new_reaches_the_model(weights, tmp_path, duplicates):
    references = [f"study {i // 8} small effusion ." for i in range(64)]
    candidates = [f"{i} heart is enlarged ." for i in range(64)]
    for i in random.Random(duplicates).sample([i for i in range(64) if i % 8], duplicates):
        candidates[i] = candidates[i - i % 8]
    seen, new = [], 64 - duplicates
    for run in (1, 2):  # two runs that share a cache folder
        judge = LabelF1(weights, cache=tmp_path, device="cpu")
        # rows of the tensors that the network is given
        judge.labeler.model.bert.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        for epoch in (1, 2):
            seen.clear()
            judge.score(candidates, references)
            assert sum(seen) == new + (8 if run == epoch == 1 else 0), (run, epoch)
        assert judge.sent == 2 * new + (8 if run == 1 else 0)
    if duplicates == 10:
        done = subprocess.run(
            [sys.executable, "-c", COUNT, str(weights), str(tmp_path)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.stdout.strip().endswith("sent 1"), done.stderr[-2000:]


def changed(state, **tensors):
    return {
        **state,
        "model_state_dict": {n: t for n, t in (state["model_state_dict"] | tensors).items() if t is not None},
    }


BROKEN = {
    "other shape": (
        {"module.linear_heads.3.weight": torch.zeros(4, 32)},
        "tensor linear_heads.3.weight is (4, 32), expected (4, 64)",
    ),
    "head of another labeler": (
        {"module.linear_heads.13.weight": torch.zeros(4, 64)},
        "tensor linear_heads.13.weight is (4, 64), expected (2, 64)",
    ),
    "missing": (
        {"module.bert.pooler.dense.bias": None},
        "tensor bert.pooler.dense.bias is nothing, expected (64,)",
    ),
    "unexpected": (
        {"module.linear_heads.14.bias": torch.zeros(4)},
        "tensor linear_heads.14.bias is (4,), expected nothing",
    ),
    "a layer left out": (
        {"module.bert.encoder.layer.5.output.dense.bias": torch.zeros(64)},
        "is nothing, expected (64",
    ),
    "no positions": (
        {"module.bert.embeddings.position_embeddings.weight": None},
        "position_embeddings.weight is nothing, expected two dimensions",
    ),
    "flat words": (
        {"module.bert.embeddings.word_embeddings.weight": torch.zeros(7)},
        "word_embeddings.weight is (7,), expected two dimensions",
    ),
    "cased vocabulary": (
        {"module.bert.embeddings.word_embeddings.weight": torch.zeros(28996, 64)},
        "has 28996 rows, expected 30522",
    ),
    "not a tensor": ({"module.bert.pooler.dense.bias": "zero"}, "not a CheXbert checkpoint (AttributeError"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_checkpoint_of_another_shape_is_told_by_tensor(state, tmp_path, kind):
    tensors, message = BROKEN[kind]
    torch.save(changed(state, **tensors), tmp_path / FILE)
    with pytest.raises(ValueError) as e:
        scorer("chexbert", model=str(tmp_path), device="cpu")
    assert (
        message in str(e.value) and str(tmp_path / FILE) in str(e.value) and "model='rules'" in str(e.value)
    )


def test_another_file_is_told_so(weights, state, tmp_path):
    path = tmp_path / FILE
    for data in (
        b"",
        b"not torch",
        weights.read_bytes()[:5000],
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        path.write_bytes(data)
        with pytest.raises(
            ValueError,
            match=r"chexbert.pth: not a CheXbert checkpoint "
            r".*StanfordAIMI/RRG_scorers; or give model='rules'",
        ):
            CheXbert(path)
    for saved in (
        state["model_state_dict"],
        [1, 2],
        {"model_state_dict": torch.zeros(3)},
        {"model_state_dict": {}},
        {"model_state_dict": state["model_state_dict"], "run": os.getcwd},
    ):
        torch.save(saved, path)
        with pytest.raises(
            ValueError, match=r"chexbert.pth: (not a CheXbert checkpoint|tensor .* no CheXbert)"
        ):
            CheXbert(path)
    torch.save(state, path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 7}')
    with pytest.raises(ValueError, match="width 64 cannot have 7 attention heads"):
        CheXbert(path)


def test_missing_weights_and_wrong_options_are_named(tmp_path):
    for model in (tmp_path, str(tmp_path), tmp_path / "none", "/no/such"):
        with pytest.raises(
            ValueError,
            match=r"chexbert.pth is not in folder .* part of StanfordAIMI/RRG_scorers: .* or model='rules'",
        ):
            scorer("chexbert", model=model)
    with pytest.raises(ValueError, match="uncertain='maybe': allowed are 'positive', 'negative' and 'class'"):
        scorer("chexbert", uncertain="maybe")
    with pytest.raises(ValueError, match="observations=7: allowed are 14 and 5"):
        scorer("chexbert", observations=7)
    with pytest.raises(ValueError, match=r"reports\[1\]=None"):
        scorer("chexbert").labels(["a", None])


report = st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join)
anything = st.one_of(
    report,
    st.text(max_size=30),
    st.text(st.characters(), max_size=10),
    st.sampled_from([*ODD[:11], "<report> a </report>"]),
)  # characters(): half surrogate pairs too
pairs = st.lists(st.tuples(anything, anything), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def judges(weights):
    kinds = {f"{u} {n}": dict(uncertain=u, observations=n) for u in UNCERTAIN for n in (14, 5)}
    real = CheXbert(weights, device="cpu")
    found = {("rules", name): LabelF1(**kind) for name, kind in kinds.items()} | {
        ("real", name): LabelF1(**kind) for name, kind in kinds.items()
    }
    for (which, _), judge in found.items():
        if which == "real":
            judge.labeler = real  # loaded once
    return found


@settings(max_examples=25, deadline=None)
@given(pairs=pairs, randomness=st.randoms(use_true_random=False), size=st.integers(1, 4))
def test_range_symmetry_identity_order_and_batch_size(judges, pairs, randomness, size):
    candidates, references = map(list, zip(*pairs))
    order = randomness.sample(range(len(pairs)), len(pairs))
    for name, judge in judges.items():
        judge.kept.clear()
        scores = judge.score(candidates, references)
        assert all(isinstance(s, float) and 0 <= s <= 1 for s in scores), name
        assert judge.score(references, candidates) == scores, name
        assert judge.score(references, references) == [1.0] * len(pairs), name
        assert judge.score([candidates[i] for i in order], [references[i] for i in order]) == [
            scores[i] for i in order
        ], name
        judge.kept.clear()
        judge.labeler.batch_size = size
        assert judge.score(candidates, references) == scores, name
        judge.labeler.batch_size = 32


@settings(max_examples=40, deadline=None)
@given(a=report, b=report)
def test_details_add_up_to_the_score(judges, a, b):
    for (which, name), judge in judges.items():
        (record,) = judge.detail([f"<report> {a} </report>"], [b])
        matched, extra, missing = (len(record[k]) for k in ("matched", "extra", "missing"))
        assert record["score"] == (
            2 * matched / (2 * matched + extra + missing) if matched + extra + missing else 1.0
        ), (which, name)
        assert all(
            0 <= start < end <= len(record["text"]) and support in (0.0, 1.0)
            for start, end, support in record["spans"]
        ), (which, name)
        if which == "real":
            assert record["spans"] == []
        else:  # each label but No Finding has its place in the text
            silent = {"No Finding"} & {*record["matched"], *record["extra"]}
            assert bool(record["spans"]) == (matched + extra > len(silent)), (name, record)


@settings(max_examples=200, deadline=None)
@given(st.lists(report, min_size=1, max_size=5).map(" . ".join))
def test_mentions_are_the_labels_places(text):
    where, labels = mentions(text), report_labels(text)
    for status in ("present", "uncertain"):
        assert {o for o, s in labels.items() if s == status} - {"No Finding"} <= {
            o for o, s, _, _ in where if s == status
        }
    for o, s, start, end in where:
        assert text[start:end].strip() == text[start:end] != ""


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([14, 5]), st.sampled_from(["radeval", "r2gen"])
)
def test_tables_are_scikit_learn_s(seed, n, observations, convention):
    rng, names = np.random.default_rng(seed), OBSERVATIONS if observations == 14 else FIVE
    said, true = (
        pd.DataFrame(rng.choice([1, 0, -1, np.nan], (n, 14), p=[0.2, 0.2, 0.1, 0.5]), columns=OBSERVATIONS)
        for _ in range(2)
    )
    positive = [1, -1] if convention == "radeval" else [1]
    binary = [frame[names].isin(positive).to_numpy() for frame in (true, said)]
    theirs = classification_report(*binary, output_dict=True, zero_division=0)
    sums = summed(said, true)
    weighted = ["weighted"] if theirs["weighted avg"]["support"] else []  # ours is NaN where nothing is there
    for average in ("micro", "macro", *weighted):
        f1 = label_f1(sums, CONVENTIONS[convention], average, observations)
        assert f1 == pytest.approx(theirs[f"{average} avg"]["f1-score"], abs=1e-12), average
    kind = CONVENTIONS[convention].uncertain
    for i, name in enumerate(names):
        tp, fp, fn = (sums[f"{kind} {count} {name}"] for count in ("tp", "fp", "fn"))
        assert tp + fn == theirs[str(i)]["support"]
        assert tp == pytest.approx(theirs[str(i)]["precision"] * (tp + fp), abs=1e-9)
        assert tp == pytest.approx(theirs[str(i)]["recall"] * (tp + fn), abs=1e-9)
