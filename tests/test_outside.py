"""Scorers in a Python of their own.

A stub that keeps or breaks the protocol is always tested, RaTEScore and GREEN if `make scorers` built
their environment."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from valor.rewards.outside import WORKER, Green, OutsideScorer, RaTEScore, scorers_python
from valor.rewards.text import scorer

STUB = """
import json, os, sys, time
print(json.dumps({"ready": True, "versions": {}}), flush=True)
batch = []
for line in sys.stdin:
    if line.strip(): batch.append(json.loads(line)); continue
    for pair in reversed(batch):                                                # any order will do
        c = pair["candidate"]
        if c == "die": print("Killed by the kernel", file=sys.stderr, flush=True); os._exit(137)
        if c == "sleep": time.sleep(60)
        if c == "noise": print("Downloading shards", flush=True)
        if c == "list": print("[1, 2]", flush=True)
        if c == "flood": sys.stderr.write("x" * 2**20)
        reply = {"id": 99 if c == "stranger" else pair["id"], "score": len(c) + len(pair["reference"]) / 1000}
        if c == "fails": reply = {"id": pair["id"], "error": "IndexError: out of range"}
        if c == "odd": reply["warning"] = "odd text"
        for _ in range(2 if c == "twice" else 1): print(json.dumps(reply), flush=True)
    batch = []
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    path = tmp_path_factory.mktemp("stub") / "stub.py"
    path.write_text(STUB)

    class Stub(OutsideScorer):
        name = "stub"

        def __init__(self, **options):
            super().__init__(path, python=sys.executable, **dict(timeout=30) | options)

    return Stub


def want(pairs):
    return [len(c.strip()) + len(r.strip()) / 1000 if c.strip() and r.strip() else 0.0 for c, r in pairs]


@pytest.fixture(scope="module")
def running(stub):
    with stub(batch_size=3) as s:
        yield s


texts = st.one_of(st.text(alphabet="ab \n\x00é心\ud800", max_size=6), st.just("<report> a </report>"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), max_size=12))
def test_scores_stay_on_their_pairs_whatever_is_empty(running, pairs):
    plain = [
        (
            c.replace("<report>", "").replace("</report>", ""),
            r.replace("<report>", "").replace("</report>", ""),
        )
        for c, r in pairs
    ]
    assert running.score([c for c, _ in pairs], [r for _, r in pairs]) == pytest.approx(want(plain))


def test_batch_size_and_order_change_nothing(stub):
    pairs = [("a" * n, "b" * (n % 5)) for n in range(20)]
    for size in (1, 7, 64):
        with stub(batch_size=size) as s:
            assert s.score(*map(list, zip(*pairs[::-1]))) == pytest.approx(want(pairs)[::-1])
            assert s.sent == 16  # four of twenty have an empty side


@pytest.mark.parametrize(
    "bad,message",
    [
        ("die", "died with exit status 137. Last lines of its standard error:\nKilled by the kernel"),
        ("noise", "said 'Downloading shards"),
        ("list", "said '[1, 2]"),
        ("stranger", "answered pair id=99"),
        ("fails", "failed on 1 pair(s), the others are scored and kept. The first: IndexError"),
    ],
)
def test_what_goes_wrong_is_said_and_the_next_call_goes_on(stub, bad, message):
    with stub(batch_size=1) as s:
        with pytest.raises(RuntimeError) as e:
            s.score(["before", bad, "behind"], ["r"] * 3)
        assert message in str(e.value)
        assert s.score(["behind", "before"], ["r"] * 2) == pytest.approx([6.001, 6.001])
        assert s.sent == (3 if bad == "fails" else 2) + (0 if bad == "fails" else 1)  # "before" was kept


def test_an_answer_given_twice_is_not_taken_for_another_pair(stub):
    with stub(batch_size=2) as s:
        with pytest.raises(RuntimeError, match="not waiting for an answer"):
            s.score(["other", "twice", "more"], ["r"] * 3)


def test_time_out_names_its_parameter_and_ends_the_child(stub):
    with stub(timeout=2) as s:
        s.start()
        child = s.child.process
        with pytest.raises(TimeoutError, match="timeout=2: the worker said nothing"):
            s.score(["sleep"], ["r"])
        assert child.poll() is not None and s.child is None


def test_a_flood_on_standard_error_blocks_nobody(stub):
    with stub() as s:
        assert s.score(["flood"] * 1 + ["a"], ["r"] * 2) == pytest.approx([5.001, 1.001])


def test_warnings_are_counted_and_shown_once(stub):
    with stub() as s, pytest.warns(UserWarning, match="stub: 2 of the new pairs: odd text") as seen:
        s.score(["odd", "odd"], ["r", "rr"])
    assert len(seen) == 1
    with stub() as s:
        with warnings.catch_warnings(action="ignore"):
            assert s.detail(["odd"], ["r"])[0]["warning"] == "odd text"


def test_a_program_that_never_gets_ready(stub, tmp_path):
    for source, message in (
        ("import sys; sys.exit('no such module')", "no such module"),
        ('print(\'{"ready": false, "error": "OSError: weights"}\')', "could not load. OSError: weights"),
    ):
        (tmp_path / "broken.py").write_text(source)
        with pytest.raises(RuntimeError, match=message):
            OutsideScorer(tmp_path / "broken.py", python=sys.executable, timeout=30).score(["a"], ["b"])


def alive(pid):
    "Whether process `pid` runs (one that only waits to be collected does not)."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_no_orphan_when_the_parent_is_killed(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    code = f"""import sys, time; from valor.rewards.outside import OutsideScorer
s = OutsideScorer({str(tmp_path / "stub.py")!r}, python=sys.executable, timeout=60)
s.score(["a"], ["b"])
print(s.child.process.pid, flush=True)
time.sleep(60)"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(child)


NOISY = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
def load():
    print("loading"); os.write(1, b"from C"); os.system("echo from a shell")
    def score(pairs):
        print("scoring"); os.write(1, b"{}")
        return [dict(score=1 / len(c.replace("?", ""))) for c, r in pairs]
    return score
worker.WORKERS["noisy"] = load, ("pytest", "no-such-package")
worker.main("noisy", "{}")
"""


def test_noise_on_standard_output_does_not_reach_the_protocol(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    with OutsideScorer(tmp_path / "noisy.py", [str(WORKER)], python=sys.executable, timeout=30) as s:
        assert s.score(["a", "bb\ud800"], ["r", "r"]) == [1.0, 0.5]
        assert s.versions["pytest"] == pytest.__version__ and "no-such-package" not in s.versions
        with pytest.raises(RuntimeError, match="failed on 1 pair.*ZeroDivisionError.*candidate '\\?'"):
            s.score(["?", "abcd", "ab"], ["x"] * 3)
        assert (
            s.score(["abcd", "ab"], ["x", "x"]) == [0.25, 0.5] and s.sent == 5
        )  # the others of the failing batch had been scored


def test_wrong_options_are_named(tmp_path):
    here = dict(python=sys.executable)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text("{}")
    for make, message in (
        (lambda: scorer("ratescore", model=str(tmp_path), **here), "no config.json in that folder"),
        (lambda: scorer("ratescore", embedder=str(tmp_path / "half"), **here), "embedder="),
        (lambda: scorer("green", model=str(tmp_path / "half"), **here), "pytorch_model.bin"),
        (lambda: scorer("green", model="rules", **here), "usually 'StanfordAIMI/GREEN-radllama2-7b'"),
        (lambda: scorer("green", python="/no/python"), "make scorers"),
        (lambda: scorer("green", colour="red"), "no option colour='red'"),
        (lambda: Green(timeout=-1, **here), "timeout=-1"),
        (lambda: RaTEScore(device="tpu", **here), "device='tpu'"),
    ):
        with pytest.raises(ValueError) as e:
            make()
        assert message in str(e.value)


try:
    PYTHON, why = scorers_python(), ""
except ValueError as e:
    PYTHON, why = None, f"no environment of RaTEScore and GREEN: `make scorers` or VALOR_SCORERS ({e})"
real = pytest.mark.skipif(PYTHON is None, reason=why)
WEIGHTS = Path(__file__).with_name("outside_weights.py")
SENTENCES = [
    "The heart is normal in size.",
    "The lungs are clear.",
    "No pleural effusion or pneumothorax.",
    "Small left effusion.",
    "Right upper lobe nodule, unchanged.",
    "Mild cardiomegaly with pulmonary edema.",
    "1. Low lung volumes. 2. No focal consolidation.",
    "FINDINGS:\nStable.",
]
PAIRS = [
    (" ".join(SENTENCES[i:j]), " ".join(SENTENCES[k:]))
    for i in range(0, 7, 2)
    for j in (i + 1, i + 4)
    for k in range(1, 8, 3)
] + [(s, s) for s in SENTENCES]


def lists(pairs):
    return [c for c, _ in pairs], [r for _, r in pairs]


def outside(*arguments, **options):
    return subprocess.run(
        [PYTHON, "-I", str(WEIGHTS), *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        **options,
    ).stdout


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    outside("make", folder)
    return folder


@real
def test_ratescore_equals_the_package_called_as_its_readme_says(weights):
    direct = json.loads(
        outside(
            "direct", weights, input=json.dumps(lists(PAIRS)), env=os.environ | {"HF_HUB_OFFLINE": "1"}
        ).splitlines()[-1]
    )
    assert (
        len(direct) == len(PAIRS) and len(set(direct)) > len(PAIRS) / 2
    )  # without an empty report nothing is forgotten
    for size in (8, 64):
        with scorer(
            "ratescore", model=str(weights / "ner"), embedder=str(weights / "encoder"), batch_size=size
        ) as s:
            ours = s.score(*lists(PAIRS))
        print(
            f"RaTEScore, batch_size {size}: largest difference to the package "
            f"{max(abs(a - b) for a, b in zip(ours, direct)):.1e}"
        )
        assert ours == pytest.approx(direct, abs=1e-6)


@real
def test_ratescore_stays_aligned_around_reports_without_a_sentence(weights):
    with scorer("ratescore", model=str(weights / "ner"), embedder=str(weights / "encoder")) as s:
        whole = s.score(*lists(PAIRS[:6]))
        holes = [
            ("", "The lungs are clear."),
            ("..", "The lungs are clear."),
            ("The lungs are clear.", "a."),
            ("", ""),
            ("\x00", "\ud83e"),
        ]
        s.known.clear()
        with pytest.warns(UserWarning, match="no sentence of three or more characters"):
            scores = s.score(
                *lists([x for pair, hole in zip(PAIRS, holes) for x in (pair, hole)] + [PAIRS[5]])
            )
        assert scores[::2] == pytest.approx(whole, abs=1e-6) and scores[1::2] == [0.0] * 5
        odd = s.score(
            ["no " * 10_000, "x" * 5_000, "\x01\x02 lungs", "ガラス 心臓", "a \ud83e nodule"],
            ["The lungs are clear."] * 5,
        )
        assert all(0 <= x <= 1 for x in odd)


@real
def test_green_reads_its_models_answer(weights):
    with scorer("green", model=str(weights / "green"), timeout=300) as s:
        assert s.score(*lists(PAIRS)) == [0.25 if "pneumothorax" in c + r else 0.75 for c, r in PAIRS]
        record = s.detail(["No pneumothorax."], ["Nodule."])[0]
        assert (record["score"], record["matched"], record["errors"]["d"]) == (
            0.25,
            1,
            2,
        ) and "[Matched Findings]:" in record["answer"]
        with pytest.warns(UserWarning, match="leaves no room for an answer"):
            assert s.score(["x " * 9, "éß" * 5_000, ""], ["Nodule."] * 3) == [0.75, 0.0, 0.0]
        assert s.score(["no " * 10_000], ["Nodule."]) == [0.75]  # 300 words are read


@real
def test_weights_of_another_shape_or_not_in_the_cache_are_named(weights):
    with (
        scorer("ratescore", model=str(weights / "green"), embedder=str(weights / "encoder")) as s,
        pytest.raises(RuntimeError, match="tags LABEL_0, LABEL_1: allowed are O and B-, I- of"),
    ):
        s.score(["a b c"], ["a b c"])
    s = scorer("green", model="StanfordAIMI/GREEN-radllama2-7b")
    s.environment |= {"HF_HUB_OFFLINE": "1"}
    with (
        s,
        pytest.raises(
            RuntimeError,
            match="could not load(.|\n)*make scorers(.|\n)*usually 'StanfordAIMI/GREEN-radllama2-7b'",
        ),
    ):
        s.score(["a"], ["b"])
