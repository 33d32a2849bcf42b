"""`valor evaluate` as a command: killed in the middle it goes on and ends with the same bytes; bad input is one line."""
import json, os, random, re, signal, subprocess, sys, time

import pytest

from valor.experiment import main

COMMAND = [sys.executable, "-c", "from valor.experiment import main; main()", "evaluate"]
ENV = os.environ | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
PHRASES = ["the heart is enlarged .", "no pleural effusion .", "left lower lobe opacity .", "the lungs are clear .", "possible pneumonia .", "a port is seen .", "no pneumothorax ."]


def write(path, n=200, seed=0):
    rng = random.Random(seed)
    rows = [dict(id=i, candidate=" ".join(rng.choices(PHRASES, k=8)) + f" {i}", reference=" ".join(rng.choices(PHRASES, k=8))) for i in range(n)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def run(*arguments): return subprocess.run([*COMMAND, *map(str, arguments)], env=ENV, capture_output=True, text=True, timeout=300)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    write(tmp_path / "mine.jsonl")
    arguments = ["--metrics", "lexical,bertscore,radgraph", "--n-boot", "100"]
    whole = run(tmp_path / "mine.jsonl", "--out", tmp_path / "whole", *arguments)
    assert whole.returncode == 0 and "RadGraph partial" in whole.stdout and "chexbert=rules" in whole.stdout, whole.stderr
    process = subprocess.Popen([*COMMAND, str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "killed"), *arguments], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scores, end = tmp_path / "killed/scores/bertscore.jsonl", time.time() + 200
    while not (scores.exists() and scores.read_text().count("\n") > 60):
        assert process.poll() is None and time.time() < end, "it ended before it could be killed"
        time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/table.csv").exists()
    done = scores.read_text().count("\n")
    with scores.open("a") as f: f.write('{"pair": "torn')
    assert run(tmp_path / "mine.jsonl", "--out", tmp_path / "killed", *arguments).returncode == 0
    assert scores.read_text().count("\n") == 201 > done
    assert (tmp_path / "killed/table.csv").read_bytes() == (tmp_path / "whole/table.csv").read_bytes()


def test_bad_input_is_one_line_and_nothing_written_is_lost(tmp_path):
    write(tmp_path / "mine.jsonl", 5)
    main(["evaluate", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "out"), "--metrics", "lexical"])
    before = (tmp_path / "out/table.csv").read_bytes()
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "candidate": "a"}\n')
    for arguments, message in (([tmp_path / "bad.jsonl"], "bad.jsonl:1: no field 'reference'"), ([tmp_path / "none.jsonl"], "no such file"), ([tmp_path / "mine.jsonl", "--metrics", "bleu"], "'bleu' is unknown"),
                               ([tmp_path / "mine.jsonl", "--set", "chexbert=/no/such"], "metric chexbert: model='/no/such'"), ([tmp_path / "mine.jsonl", "--set", "radgraf=x"], "unknown option radgraf")):
        with pytest.raises(SystemExit, match=re.escape(message)) as end: main(["evaluate", *map(str, arguments), "--out", str(tmp_path / "out")])
        assert "\n" not in str(end.value)
    assert (tmp_path / "out/table.csv").read_bytes() == before
