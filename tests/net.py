"""Compares what this checkout computes with what another commit computed, for changes that must not
change behaviour. By hand, some four minutes on two cores:

python tests/net.py record /tmp/net.json     # on the commit before the change python tests/net.py compare
/tmp/net.json    # after each step; says "equal", or lists what differs

It records the keys of all phases for all presets and benchmarks, the help of every command, and, of smoke
runs of both embedded benchmarks, hashes of all weights, tables, reports and figures. The hashes hold for
one machine and one set of libraries, so the record is not committed. `--quick` leaves the runs out."""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEYS = """import json, os, sys, tempfile
from valor.config import BENCHMARKS, PRESETS, REAL_SOURCES, preset
from valor.runs.phases import PHASES, phase_key
keys = {}
for name in PRESETS:
    for benchmark in (*BENCHMARKS, *REAL_SOURCES):
        root = {} if benchmark in BENCHMARKS else {"data_root": "a-folder-that-is-not-there"}
        for seed in (0, 1):
            try:
                cfg = preset(name, benchmark=benchmark, seed=seed, **root)
                for phase in PHASES:
                    keys[f"{name} {benchmark} seed {seed} {phase}"] = phase_key(phase, cfg)
            except ValueError as e:
                keys[f"{name} {benchmark} seed {seed}"] = f"{type(e).__name__}: {e}"
print(json.dumps(keys))
"""
COMMANDS = (
    "",
    "run",
    "train",
    "evaluate",
    "data-report",
    "convert-llava-med",
    "merge",
    "generate",
    "serve",
    "gallery",
    "config",
    "watch",
    "push",
)
TIMES = ("seconds", "time", "per_second", "runtime")  # parts of the names of columns that measure time


def python(*args, **env):
    "Standard output of the program `args` in this checkout; ends with its messages where it fails."
    done = subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return done.stdout


def table_without_times(path):
    "The CSV file `path` as bytes, without columns that measure time."
    rows = list(csv.reader(io.StringIO(path.read_text())))
    kept = [i for i, name in enumerate(rows[0]) if not any(part in name for part in TIMES)] if rows else []
    return json.dumps([[row[i] for i in kept if i < len(row)] for row in rows]).encode()


def contents(path):
    """What the hash of the file `path` is taken of, or None for a file that differs from run to run
    (times, paths)."""
    if path.stem.endswith("_steps"):  # how long each part of a step took
        return None
    if path.suffix == ".csv":
        return table_without_times(path)
    if path.suffixes[-2:] == [".jsonl", ".gz"]:
        return gzip.decompress(path.read_bytes())
    if path.suffix in (".safetensors", ".npy", ".npz", ".png", ".arrow", ".jsonl"):
        return path.read_bytes()
    return None


def hashes(folder):
    "{file below `folder`: SHA-256 of its contents}."
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and (data := contents(path)) is not None:
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()[:16]
    return found


def smoke_runs():
    "Hashes of what the main job on both benchmarks writes, and the preference baselines on phantom."
    found = {}
    for benchmark in ("phantom", "openi_rendered"):
        with tempfile.TemporaryDirectory() as work:
            settings = ["--preset", "smoke", "--set", f"benchmark={benchmark}"]
            env = {
                "VALOR_RUNS": f"{work}/runs",
                "VALOR_FIGURES": f"{work}/figures",
                "VALOR_CACHE": f"{work}/cache",
            }
            python("-m", "valor", "run", *settings, **env)
            for phase in ("dpo", "mmedpo"):
                python("-m", "valor", "train", "--until", phase, *settings, **env)
            found |= {
                f"{benchmark}/{name}": digest
                for name, digest in hashes(work).items()
                if "/cache/" not in name
            }
    return found


def measured(quick):
    found = {
        "keys": json.loads(python("-c", KEYS)),
        "help": {c: python("-m", "valor", *c.split(), "--help", COLUMNS="110") for c in COMMANDS},
    }
    return found if quick else found | {"runs": smoke_runs()}


def differences(before, now):
    "One line for each entry that is in one of the two records alone, or has another value in each."
    lines = []
    for part in before.keys() & now.keys():
        for name in sorted(before[part].keys() | now[part].keys()):
            old, new = before[part].get(name), now[part].get(name)
            if old != new:
                lines.append(f"{part}, {name or 'valor'}: {old!r} before, {new!r} now")
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true", help="keys and help alone")
    args = parser.parse_args()
    now = measured(args.quick)
    if args.what == "record":
        args.file.write_text(json.dumps(now, indent=1))
        print(f"{args.file}: {', '.join(f'{len(entries)} {part}' for part, entries in now.items())}")
        return
    found = differences(json.loads(args.file.read_text()), now)
    if found:
        sys.exit("\n".join([*found, f"{len(found)} differences"]))
    print(f"equal ({', '.join(f'{len(entries)} {part}' for part, entries in now.items())})")


if __name__ == "__main__":
    main()
