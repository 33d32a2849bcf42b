"""What an indication is worth: SFT on phantom with and without the clinical question in the prompt, on the
test studies of each seed. By hand, some minutes a seed; finished phases are used again. Writes
figures/context_phantom.csv.

python tests/context_effect.py [SEED ...]"""

import sys

from valor.config import preset
from valor.figures import save
from valor.metrics.statistics import METRICS, system_table
from valor.runs.makers import note_of, read_frame
from valor.runs.phases import ensure

SHOWN = ["BLEU-4", "ROUGE-L", "label micro F1", "finding F1", "located F1", "hallucinated", "missed", "words"]
PROMPTS = {"no context": (), "indication": ("indication",)}

if __name__ == "__main__":
    seeds = [int(word) for word in sys.argv[1:]] or [0]
    runs = {
        name: {seed: preset("laptop", seed=seed, threads=1, context=context) for seed in seeds}
        for name, context in PROMPTS.items()
    }
    folders = {name: {seed: ensure("eval_sft", cfg) for seed, cfg in of.items()} for name, of in runs.items()}
    frames = {
        name: {seed: read_frame(path, "test") for seed, path in of.items()} for name, of in folders.items()
    }
    table = system_table(frames, {name: METRICS[name] for name in SHOWN}, against="no context", n=2000)
    cfgs = [cfg for of in runs.values() for cfg in of.values()]
    paths = [path for of in folders.values() for path in of.values()]
    save("context_phantom", table, cfgs=cfgs, runs=paths, note=note_of(cfgs[0]))
    print(table.to_string(index=False, float_format="{:.3f}".format))
