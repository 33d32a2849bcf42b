"""What an indication is worth: SFT on phantom with and without the clinical question in the prompt, on the
test studies of each seed; as a control, the policy that was trained with it is given another study's. By
hand, ten minutes a seed; finished phases are used again. Writes figures/context_phantom.csv.

python tests/context_effect.py [SEED ...]"""

import sys

import pandas as pd

from valor.config import Config, preset
from valor.expert.controls import partners
from valor.figures import save
from valor.metrics import statistics as ev
from valor.policy.prompt import asked_by, image_lists
from valor.policy.tiny import generate
from valor.runs.makers import labeler, note_of, policy_of, read_frame
from valor.runs.phases import ensure, load_data, phase_folder

SHOWN = ["BLEU-4", "ROUGE-L", "label micro F1", "finding F1", "located F1", "hallucinated", "missed"]
SHOWN += ["abnormal recall", "specificity", "words"]
PROMPTS = {"no context": (), "indication": ("indication",)}
CONTROL = "another study's indication"


def with_others_questions(cfg: Config) -> pd.DataFrame:
    "Frame of the SFT policy of `cfg` on its test studies, each asked with the context of another study."
    test = load_data(phase_folder("data", cfg))["test"]
    model, processor = policy_of("sft", cfg)
    questions = asked_by(processor).questions(test)
    others = [questions[i] for i in partners(len(test))]
    how = dict(batch_size=cfg.eval_batch_size, desc=CONTROL, asked=others)
    written = generate(model, processor, image_lists(test), cfg.max_new_tokens, **how)
    return ev.score_reports(written, test, cfg.benchmark, labeler=labeler(cfg))


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
    frames[CONTROL] = {seed: with_others_questions(cfg) for seed, cfg in runs["indication"].items()}
    table = ev.system_table(frames, {name: ev.METRICS[name] for name in SHOWN}, against="no context", n=2000)
    cfgs = [cfg for of in runs.values() for cfg in of.values()]
    paths = [path for of in folders.values() for path in of.values()]
    save("context_phantom", table, cfgs=cfgs, runs=paths, note=note_of(cfgs[0]))
    print(table.to_string(index=False, float_format="{:.3f}".format))
