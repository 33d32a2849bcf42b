"""Time and peak memory of indexing, reopening and storing real studies, by number of studies. `python
tests/bench_data.py [n …]` (default 1000 10000).

Trees in MIMIC-CXR-JPG's, Kaggle's and Open-i's layout; their films are links to eight made-up radiographs
of 2,544 x 3,056 pixels. Every measurement is a process of its own."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

ONE = """
import sys, time
from pathlib import Path
from valor.data.studies import load_studies
source, root, cache = sys.argv[1:4]
memory = lambda what: int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) / 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, without that of the imports
before, start = memory("VmRSS:"), time.perf_counter()
studies = load_studies(source, root, cache=cache, size=336)
print(sum(map(len, studies.values())), time.perf_counter() - start, memory("VmHWM:") - before)
"""


def linked(films):
    "A stand-in for `trees.film` that links to one of the prepared `films` instead of drawing."

    def film(path, i, mode="L", size=None, view="frontal"):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(films[path.suffix][i % len(films[path.suffix])], path)

    return film


def prepared(home):
    import numpy as np
    from PIL import Image

    from valor.data.phantom import Finding, render

    out = {".jpg": [], ".png": []}
    for i in range(8):
        big = Image.fromarray(
            np.asarray(render([Finding("effusion", "left", None, "mild")], i, 512)[0])
        ).resize((2544, 3056), Image.Resampling.BICUBIC)
        grain = np.random.default_rng(i).normal(0, 4, (3056, 2544))
        image = Image.fromarray((np.asarray(big) + grain).clip(0, 255).astype(np.uint8))
        for suffix in out:
            out[suffix].append(home / f"{i}{suffix}")
            (image if suffix == ".jpg" else image.resize((512, 624))).save(out[suffix][-1])
    return out


def main(sizes):
    import trees

    from valor.data.studies import Studies, store_images

    home = Path(tempfile.mkdtemp())
    trees.film = linked(prepared(home))
    print(f"{'layout':16}{'studies':>9}{'index s':>9}{'peak MB':>9}{'again s':>9}{'again MB':>10}")
    for name, make in dict(
        mimic_cxr_jpg=trees.mimic,
        kaggle_indiana=trees.kaggle,
        openi=trees.openi,
        r2gen_mimic=lambda r, n: trees.r2gen(r, n, mimic=True),
    ).items():
        for n in sizes:
            root = make(home / f"{name}{n}", n)
            runs = [
                subprocess.run(
                    [sys.executable, "-c", ONE, name, root, home / f"cache{name}{n}"],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout.split()
                for _ in range(2)
            ]
            print(
                f"{name:16}{int(runs[0][0]):9,}{float(runs[0][1]):9.1f}{float(runs[0][2]):9.0f}{float(runs[1][1]):9.2f}{float(runs[1][2]):10.0f}",
                flush=True,
            )
    folder = next(p for p in (home / f"cachemimic_cxr_jpg{sizes[0]}").iterdir() if p.is_dir())
    some, start = Studies.open(folder)["train"].select(range(200)), time.perf_counter()
    store_images(some, home / "stored", 336)
    once = time.perf_counter() - start
    print(f"decoding 200 films of 2,544 x 3,056 to 336 x 336: {once:.1f} s, {200 / once:.0f} a second")


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [1000, 10000])
