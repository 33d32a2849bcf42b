"""RadEval's `make_reward_fn("f1chexbert")` and `make_reward_fn("radgraph")` on the batch and weights that
bench_rewards.py wrote; run by it in RadEval's own environment (`--radeval PYTHON`, where `pip install
radeval==2.2.1 "numpy<2" "pandas<3.1" "pyarrow==24" "scikit-learn<1.6"` was done). Shims: the hub is asked
for nothing (weights, configuration and vocabulary are handed over), the device is given (its default is a
GPU), and radgraph's two of `valor.rewards.radgraph.shims`, and the package's own name, which its radgraph
misspells."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

job = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(job["threads"])
cache = tempfile.TemporaryDirectory()  # where radgraph looks for weights
os.environ["XDG_CACHE_HOME"] = cache.name
Path(cache.name, "radgraph").mkdir()
Path(cache.name, "radgraph", "0.1.18").symlink_to(job["radgraph_cache"])
from radeval.metrics.f1chexbert import f1chexbert as module

tokenizer = transformers.AutoTokenizer.from_pretrained(job["tokenizer"])
module.AutoConfig.from_pretrained = classmethod(lambda cls, *a, **k: transformers.BertConfig())
module.BertTokenizer.from_pretrained = classmethod(lambda cls, *a, **k: tokenizer)
module.hf_hub_download = lambda **k: job["chexbert"]
module.F1CheXbert.__init__.__kwdefaults__["device"] = job["device"]
Base = transformers.PreTrainedTokenizerBase
if not hasattr(Base, "encode_plus"):
    Base.encode_plus = Base.__call__
if not hasattr(Base, "build_inputs_with_special_tokens"):
    Base.build_inputs_with_special_tokens = lambda self, ids: [self.cls_token_id, *ids, self.sep_token_id]
load = torch.load


def load_weights(path, *a, **k):
    state = load(path, map_location=job["device"], weights_only=True)
    if "model_state_dict" in state:
        state["model_state_dict"] = {
            n: t for n, t in state["model_state_dict"].items() if not n.endswith("position_ids")
        }
    return state


torch.load = load_weights
from radeval.rewards import make_reward_fn

for metric, key in (("f1chexbert", "f1chexbert_sample_acc_all"), ("radgraph", "radgraph_partial")):
    try:
        if metric == "radgraph":
            sys.modules["RadEval"] = __import__("radeval")  # its radgraph imports itself by another name
        reward = make_reward_fn(metric, key=key)
        reward(completions=["warm up ."], ground_truth=["warm up ."])
        start = time.perf_counter()
        reward(completions=job["candidates"], ground_truth=job["references"])
        print(json.dumps({metric: time.perf_counter() - start}), flush=True)
    except Exception as e:
        print(json.dumps({metric: f"{type(e).__name__}: {str(e)[:200]}"}), flush=True)
