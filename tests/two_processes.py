"""Run under torchrun by test_two_processes.py: two updates of a miniature stage 2, then what this process saw, as JSON."""
import json, sys
from pathlib import Path

import numpy as np, torch
from datasets import Dataset, Features, Image as ImageFeature, Value
from PIL import Image

from valor.config import preset
from valor.grpo import CLINICAL_SCORERS, TEXT_SCORERS, Rewards, make_trainer

torch.set_num_threads(1)
out, words = Path(sys.argv[1]), "<report> the heart is large. no effusion or edema seen. </report>"
calls = []


class Share:
    def __init__(self, word): self.word = word
    def score(self, candidates, references):
        calls.append(self.word)
        return [c.split().count(self.word) / max(1, len(c.split())) for c in candidates]


images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32), dtype=np.uint8)) for i in range(8)]
data = Dataset.from_dict(dict(image=images, report=[words] * 8), features=Features(image=ImageFeature(), report=Value("string")))
cfg = preset("smoke", group_size=4, batch_size=1, max_new_tokens=8, k_clin=2, stage2_steps=3)
scorers = {n: Share(w) for n, w in zip((*TEXT_SCORERS, *CLINICAL_SCORERS, "format"), "the heart is effusion edema seen".split())}
rewards = Rewards(scorers, cfg.k_clin, similarity=lambda texts, rows: [float(len(t)) for t in texts])
calls.clear()                                                                     # the trial before training
trainer = make_trainer(sys.argv[2], data, out / "t", rewards, cfg, "language+projector", 0.5, cfg.stage2_steps, seed=0, k_start=5, per_device=2)
seen = []
generate = trainer._generate_and_score_completions


def spy(inputs):
    output = generate(inputs)
    seen.append(dict(k=trainer.k, scores=torch.nan_to_num(trainer.scores, nan=-1.).tolist(), advantages=output["advantages"].tolist()))
    return output


trainer._generate_and_score_completions = spy
trainer.train()
rank = trainer.accelerator.process_index
moved = {n: p.sum().item() for n, p in trainer.model.named_parameters() if p.requires_grad}
(out / f"rank{rank}.json").write_text(json.dumps(dict(seen=seen, clinical_calls=sum(w in ("effusion", "edema") for w in calls), weights=moved)))
