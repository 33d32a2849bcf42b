"""What a rollout batch of rewards costs: `scorer(...)` and each package as its README calls it.

python tests/bench_rewards.py [--prompts 8] [--device cuda] [--chexbert chexbert.pth] [--radgraph FOLDER]

python tests/bench_rewards.py --outside          # RadGraph on one CPU thread: what is not its networks

Weights are made up at the true size (BERT-base) unless real ones are given; the values do not
matter for speed.
The packages get only the shims that they need on transformers 5:
f1chexbert gets `encode_plus` and a network made without the hub (`package_chexbert`),
radgraph gets `encode_plus` and `build_inputs_with_special_tokens` (`shims`)."""

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from valor.rewards.chexbert import LabelF1
from valor.rewards.radgraph import EntityF1, RadGraph, load_radgraph, radgraph_folder, shims
from valor.rewards.text import BertScore, minilm_folder
from valor.testing import miniature_chexbert, miniature_radgraph, package_chexbert

PHRASES = [
    "the heart is normal in size .",
    "the heart is mildly enlarged .",
    "there is no pleural effusion .",
    "small left pleural effusion .",
    "no acute cardiopulmonary abnormality .",
    "no focal consolidation , pneumothorax or pleural effusion .",
    "the lungs are clear .",
    "right upper lobe nodule .",
    "low lung volumes with bibasilar atelectasis .",
]


def batch(prompts, group, duplicates, seed=0):
    "Candidates and references of one batch, eight sentences a report; a share `duplicates` repeats another."
    rng, said = random.Random(seed), lambda: " ".join(rng.choices(PHRASES, k=8))
    references = [f"{said()} study {i} ." for i in range(prompts) for _ in (0,)]
    candidates = [said() + f" {i} ." for i in range(prompts * group)]
    for i in rng.sample(
        [i for i in range(len(candidates)) if i % group], round(duplicates * len(candidates))
    ):
        candidates[i] = candidates[i - i % group]
    return candidates, [r for r in references for _ in range(group)]


def seconds(f, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def clocked(modules) -> list[float]:
    "The processor seconds, in a list of one number, that `modules` spend from now on."
    spent = [0.0]

    def around(inner):
        def timed(*args, **kw):
            start = time.process_time()
            try:
                return inner(*args, **kw)
            finally:
                spent[0] += time.process_time() - start

        return timed

    for module in modules:
        module.forward = around(module.forward)
    return spent


def networks_of(dygie) -> list:
    "The modules of DyGIE++ that compute: encoder, and scorers of spans, mentions and pairs."
    relation = dygie._relation
    layers = [dygie._ner._ner_scorers, relation._relation_feedforwards, relation._relation_scorers]
    return [
        dygie._embedder.token_embedder_bert._matched_embedder.transformer_model,
        *(module for kinds in layers for module in kinds.values()),
        *(pruner._scorer for pruner in relation._mention_pruners.values()),
    ]


def fewer_entities(folder, by=5.0):
    "Lower the scores of all entities in the made-up weights in `folder`, so that a report has some forty."
    weights = torch.load(folder / "weights.th", weights_only=True)
    for name in weights:
        if "_ner_scorers" in name and name.endswith("1._module.bias"):
            weights[name] -= by
    torch.save(weights, folder / "weights.th")


def outside(a, repeats=3):
    "Print the processor time a report that RadGraph, the package's and ours, spends outside its networks."
    candidates, references = batch(a.prompts, a.group, a.duplicates)
    texts = list(dict.fromkeys(candidates + references))
    with tempfile.TemporaryDirectory() as folder, shims(), torch.no_grad():
        place = miniature_radgraph(folder)[0]
        fewer_entities(place)
        package, ours = load_radgraph(place, "radgraph-xl"), RadGraph(place, device="cpu")
        for name, network, read in (("package", package.model, package), ("ours", ours.network, ours.graphs)):
            found, spent, least = read(texts), clocked(networks_of(network)), float("inf")
            for _ in range(repeats):
                start, spent[0] = time.process_time(), 0.0
                read(texts)
                least = min(least, time.process_time() - start - spent[0])
            graphs = found.values() if isinstance(found, dict) else found
            entities = sum(len(graph["entities"]) for graph in graphs) / len(texts)
            print(f"{name:8} {1e3 * least / len(texts):6.2f} ms a report, {entities:.0f} entities in each")


def radeval(a, candidates, references, chexbert, radgraph):
    "Print the seconds that RadEval's reward functions take for the same batch and weights."
    with tempfile.TemporaryDirectory() as folder:
        job = dict(
            candidates=candidates,
            references=references,
            chexbert=str(chexbert),
            radgraph_cache=str(Path(radgraph).parent),
            tokenizer=minilm_folder(),
            device=a.device,
            threads=a.threads,
        )
        Path(folder, "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [a.radeval, str(Path(__file__).with_name("bench_radeval.py")), str(Path(folder, "job.json"))],
            capture_output=True,
            text=True,
            env=os.environ | dict(OMP_NUM_THREADS=str(a.threads)),
        )
        for line in filter(lambda l: l.startswith("{"), done.stdout.splitlines()):
            for name, took in json.loads(line).items():
                print(f"RadEval {name}: {took if isinstance(took, str) else f'{took:.2f}s'}", flush=True)
        if done.returncode:
            print("RadEval:", done.stderr.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=8)
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--duplicates", type=float, default=0.3)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--chexbert")
    p.add_argument("--radgraph")
    p.add_argument("--radeval", metavar="PYTHON", help="a Python in which radeval runs, see bench_radeval.py")
    p.add_argument("--outside", action="store_true", help="only what RadGraph spends outside its networks")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.outside:
        return outside(a)
    c, r = batch(a.prompts, a.group, a.duplicates)
    with tempfile.TemporaryDirectory() as folder:
        chexbert = a.chexbert or miniature_chexbert(folder, 768, 12)
        radgraph = a.radgraph or miniature_radgraph(folder, "radgraph-xl", 768, 12)[0]
        import bert_score

        package = load_radgraph(radgraph_folder(radgraph, "radgraph-xl"), "radgraph-xl")
        package.device = torch.device(a.device)
        package.model.to(a.device)
        ours = {
            "bertscore": BertScore(device=a.device),
            "chexbert": LabelF1(chexbert, device=a.device),
            "radgraph": EntityF1(radgraph, device=a.device),
        }
        referee = package_chexbert(chexbert, ours["chexbert"].labeler.tokenizer).to(a.device)
        referee.device = torch.device(a.device)
        berts = bert_score.BERTScorer(model_type=minilm_folder(), num_layers=6, device=a.device)
        theirs = {
            "bertscore": lambda: berts.score(c, r),
            "chexbert": lambda: [referee.get_label(t) for t in c + r],
            "radgraph": lambda: package(c + r),
        }
        print(
            f"{len(c)} candidates, {a.group} to a reference, {a.duplicates:.0%} duplicates, "
            f"{a.device}, {a.threads} thread(s)\n"
            f"{'':10}{'package':>10}{'epoch 1':>10}{'epoch 2':>10}{'ratio':>9}{'ratio':>7}"
        )
        total = [0, 0, 0]
        with shims(), torch.no_grad():
            for name, judge in ours.items():
                judge.score(["warm up ."], ["warm up ."])
                times = [
                    seconds(theirs[name], a.device),
                    seconds(lambda: judge.score(c, r), a.device),
                    seconds(lambda: judge.score(c, r), a.device),
                ]
                total = [x + y for x, y in zip(total, times)]
                print(
                    f"{name:10}"
                    + "".join(f"{t:9.2f}s" for t in times)
                    + f"{times[0] / times[1]:8.1f}x{times[0] / times[2]:6.1f}x",
                    flush=True,
                )
        if a.radeval:
            radeval(a, c, r, chexbert, radgraph)
        print(
            f"{'together':10}"
            + "".join(f"{t:9.2f}s" for t in total)
            + f"{total[0] / total[1]:8.1f}x{total[0] / total[2]:6.1f}x"
        )


if __name__ == "__main__":
    main()
