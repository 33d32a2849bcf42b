"""Where `dpo_lr` comes from: DPO and MMedPO at several learning rates, judged on the validation studies
of phantom, seed 0 (not on the test set). Takes about a quarter of an hour; writes
figures/dpo_lr_phantom.csv.

python tests/tune_preference.py [RATE ...]"""

import sys

import pandas as pd
from tune_stages import measured

from valor.config import preset
from valor.figures import save
from valor.policy.prompt import image_lists
from valor.runs.makers import note_of
from valor.runs.phases import ensure, load_data, phase_folder

SHOWN = ["BLEU-4", "ROUGE-L", "label micro F1", "located F1", "finding F1", "hallucinated", "missed", "words"]


def on_validation(phase, cfg):
    "Measures of the policy of a phase on the validation studies, greedy."
    ensure(phase, cfg)
    val = load_data(phase_folder("data", cfg))["val"]
    return measured(phase, cfg, val, image_lists(val))[SHOWN].to_dict()


if __name__ == "__main__":
    rates = [float(x) for x in sys.argv[1:]] or [1e-5, 2e-5, 5e-5, 1e-4, 2e-4]
    tried = [("sft", preset("laptop"))] + [
        (phase, preset("laptop", dpo_lr=rate)) for phase in ("dpo", "mmedpo") for rate in rates
    ]
    table = pd.DataFrame(
        [
            dict(phase=phase, dpo_lr=None if phase == "sft" else cfg.dpo_lr) | on_validation(phase, cfg)
            for phase, cfg in tried
        ]
    )
    save(
        "dpo_lr_phantom",
        table,
        cfgs=[cfg for _, cfg in tried],
        runs=[phase_folder(*t) for t in tried],
        note=note_of(tried[0][1]),
    )
    print(table.to_string(index=False, float_format="{:.4g}".format))
