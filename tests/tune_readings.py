"""How far the paper's other readings (`valor.config.READINGS`) move the embedded result. By hand, a quarter
of an hour a seed on one core; writes figures/readings_smoke.csv.

They are of smoke size (four updates a stage), so they show which choices change what the policy becomes,
and not which of them is better.

python tests/tune_readings.py [SEED ...]"""

import dataclasses
import sys

import pandas as pd

from valor.config import Config, figures_dir, preset
from valor.figures import save
from valor.metrics import statistics as ev
from valor.runs.makers import note_of, read_frame, read_reports
from valor.runs.phases import ensure, phase_folder

SMALL = dict(
    n_train=300,
    n_test=60,
    batch_size=2,
    group_size=4,
    base_studies=300,
    warmup_epochs=3,
    sft_epochs=3,
    expert_steps=60,
    stage1_steps=4,
    stage2_steps=4,
    max_new_tokens=48,
    eval_steps=None,
    threads=1,
)
READINGS = {  # after `valor.config.READINGS`, at this policy's `lr` (there the projector's is 200 times it)
    "default": {},
    "default, drawn again": dict(temperature=1.001),  # other reports are sampled, else it is the default
    "default, drawn a third time": dict(temperature=0.999),
    "projector alone in stage 2": dict(stage2_modules="projector"),
    "projector's rate 20 times": dict(lr_projector=20 * Config.lr),
    "r 128, alpha 256": dict(lora_r=128, lora_alpha=256),
    "beta 0.01": dict(beta=0.01),
    "images of 128 pixels": dict(image_size=128),  # the embedded policy is made for 64 to 128
}
SHOWN = ["BLEU-4", "ROUGE-L", "label micro F1", "located F1", "hallucinated", "words"]


def measured(cfg: Config, default: list[str] | None) -> tuple[dict, list[str]]:
    "What the policy after stage 2 does on the test studies, and its reports (`default`: the default's)."
    folder = ensure("eval_stage2", cfg)
    reports, log = read_reports(folder, "test"), pd.read_csv(ensure("stage2", cfg) / "log.csv")
    measures = ev.measure(read_frame(folder, "test"))
    differ = None if default is None else sum(a != b for a, b in zip(reports, default)) / len(reports)
    return dict(differ=differ, kl=log["kl"].tail(3).mean()) | {m: measures[m] for m in SHOWN}, reports


if __name__ == "__main__":
    rows, tried = [], []
    for seed in [int(x) for x in sys.argv[1:]] or [0, 1]:
        default = None
        for name, change in READINGS.items():
            cfg = dataclasses.replace(preset("smoke", seed=seed, **SMALL), **change)
            found, reports = measured(cfg, default)
            default = default or reports
            sizes = dict(trained=cfg.n_train, tested=cfg.n_test, updates=cfg.stage1_steps + cfg.stage2_steps)
            settings = ", ".join(f"{key}={value!r}" for key, value in change.items())
            rows.append(dict(reading=name, settings=settings, seed=seed) | sizes | found)
            tried.append(cfg)
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    runs = [phase_folder("eval_stage2", cfg) for cfg in tried]
    save("readings_smoke", table, cfgs=tried, runs=runs, note=note_of(tried[0]), out=figures_dir())
    print(table.to_string(index=False, float_format="{:.4g}".format))
