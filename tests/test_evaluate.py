"""`valor evaluate` as a command: killed in the middle it goes on and ends with the same bytes; bad input
is one line."""

import json
import random
import re

import pandas as pd
import pytest
from kills import finish, kill_at

from valor.cli import main

PHRASES = [
    "the heart is enlarged .",
    "no pleural effusion .",
    "left lower lobe opacity .",
    "the lungs are clear .",
    "possible pneumonia .",
    "a port is seen .",
    "no pneumothorax .",
]


def write(path, n=200, seed=0):
    rng = random.Random(seed)
    rows = [
        dict(
            id=i,
            candidate=" ".join(rng.choices(PHRASES, k=8)) + f" {i}",
            reference=" ".join(rng.choices(PHRASES, k=8)),
        )
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    write(tmp_path / "mine.jsonl")

    def evaluate(out):
        command = ["evaluate", f"{tmp_path}/mine.jsonl", "--out", f"{tmp_path / out}"]
        command += ["--metrics", "lexical,bertscore,radgraph", "--n-boot", "100"]
        return f"from valor.cli import main; main({command})"

    shown = finish(evaluate("whole"), tmp_path, 300)
    assert "RadGraph partial" in shown and "chexbert=rules" in shown
    scores = tmp_path / "killed/scores/bertscore.jsonl"
    kill_at(
        evaluate("killed"),
        tmp_path,
        "killed/scores/bertscore.jsonl",
        200,
        ready=lambda _: scores.read_text().count("\n") > 60,
    )
    assert not (tmp_path / "killed/table.csv").exists()
    done = scores.read_text().count("\n")
    with scores.open("a") as f:
        f.write('{"pair": "torn')
    finish(evaluate("killed"), tmp_path, 300)
    assert scores.read_text().count("\n") == 201 > done
    assert (tmp_path / "killed/table.csv").read_bytes() == (tmp_path / "whole/table.csv").read_bytes()


def test_bad_input_is_one_line_and_nothing_written_is_lost(tmp_path):
    write(tmp_path / "mine.jsonl", 5)
    main(["evaluate", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "out"), "--metrics", "lexical"])
    before = (tmp_path / "out/table.csv").read_bytes()
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "candidate": "a"}\n')
    for arguments, message in (
        ([tmp_path / "bad.jsonl"], "bad.jsonl:1: no field 'reference'"),
        ([tmp_path / "none.jsonl"], "no such file"),
        ([tmp_path / "mine.jsonl", "--metrics", "bleu"], "'bleu' is unknown"),
        ([tmp_path / "mine.jsonl", "--set", "chexbert=/no/such"], "metric chexbert: model='/no/such'"),
        ([tmp_path / "mine.jsonl", "--set", "radgraf=x"], "unknown option radgraf"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)) as end:
            main(["evaluate", *map(str, arguments), "--out", str(tmp_path / "out")])
        assert "\n" not in str(end.value)
    assert (tmp_path / "out/table.csv").read_bytes() == before


def test_intervals_are_drawn_over_patients_where_one_has_several_studies(tmp_path, capsys):
    write(tmp_path / "mine.jsonl", n=40)
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    # every report four times: 40 studies say no more than the ten patients that they are of
    tens = [rows[i // 4] | dict(id=i, patient=f"p{i // 4}") for i in range(40)]
    (tmp_path / "tens.jsonl").write_text("".join(json.dumps(r) + "\n" for r in tens))
    alone = [{k: v for k, v in r.items() if k != "patient"} for r in tens]
    (tmp_path / "alone.jsonl").write_text("".join(json.dumps(r) + "\n" for r in alone))
    width, shown = {}, {}
    for name in ("tens", "alone"):
        out = tmp_path / name
        main(
            [
                "evaluate",
                f"{tmp_path}/{name}.jsonl",
                "--out",
                str(out),
                "--metrics",
                "lexical",
                "--n-boot",
                "400",
            ]
        )
        shown[name] = capsys.readouterr().out
        table = pd.read_csv(out / "table.csv").set_index("metric")
        width[name] = table.hi["ROUGE-L"] - table.lo["ROUGE-L"]
    assert "draws over patients" in shown["tens"] and "draws over studies" in shown["alone"]
    assert 1.5 < width["tens"] / width["alone"] < 2.7  # √4 = 2
