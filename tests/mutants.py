"""Faults put in on purpose, one at a time, and the test that must then fail. By hand, not part of make test (a few seconds each): python tests/mutants.py [part of a name]

A mutant that survives means that the test does not see the fault. The package is copied for it; the checkout stays as it is."""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import datasets
import matplotlib.pyplot
import peft
import pytest
import seaborn
import torch
import transformers
import trl  # imported once, for all mutants
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = [  # name, module of valor, its text, text put in its place, test in tests/
    (
        "Eq. 4: lambda_cx and lambda_rg swapped",
        "train/grpo",
        "cfg.lambda_cx, cfg.lambda_rg) + extra",
        "cfg.lambda_rg, cfg.lambda_cx) + extra",
        "test_exact.py::test_composite_reward_by_hand",
    ),
    (
        "Eq. 4: swapped inside",
        "rewards/compose",
        'check_weight("lambda_cx", lambda_cx) * cx + check_weight("lambda_rg", lambda_rg) * rg',
        'check_weight("lambda_cx", lambda_cx) * rg + check_weight("lambda_rg", lambda_rg) * cx',
        "test_exact.py::test_composite_reward_by_hand",
    ),
    (
        "Eq. 3: lambda_lex and lambda_sem swapped",
        "train/grpo",
        "cfg.lambda_lex, cfg.lambda_sem) + extra",
        "cfg.lambda_sem, cfg.lambda_lex) + extra",
        "test_exact.py::test_composite_reward_by_hand",
    ),
    (
        "Eq. 3: swapped inside",
        "rewards/compose",
        "return lambda_lex * (bleu + rouge) + lambda_sem * bert",
        "return lambda_sem * (bleu + rouge) + lambda_lex * bert",
        "test_exact.py::test_composite_reward_by_hand",
    ),
    (
        "Eq. 5: lambda_clin dropped",
        "rewards/compose",
        "return ver + lambda_clin * clin",
        "return ver + clin",
        "test_exact.py::test_composite_reward_by_hand",
    ),
    (
        "Eq. 3: its extra rewards left out",
        "train/grpo",
        " + extra(scores, own, 3)",
        "",
        "test_exact.py::test_composite_reward_by_hand",
    ),
    (
        "Eq. 3: another equation's extra rewards",
        "train/grpo",
        "extra(scores, own, 3)",
        "extra(scores, own, 8)",
        "test_exact.py::test_composite_reward_by_hand",
    ),
    (
        "Eq. 8: its extra rewards left out",
        "train/grpo",
        " + extra(scores, own, 8)",
        "",
        "test_exact.py::test_composite_reward_by_hand",
    ),
    (
        "extra rewards without their weights",
        "rewards/compose",
        "sum(weight * scores[name]",
        "sum(scores[name]",
        "test_exact.py::test_composite_reward_by_hand",
    ),
    (
        "epsilon ignored",
        "train/grpo",
        ", epsilon=cfg.epsilon",
        "",
        "test_exact.py::test_configuration_reaches_trl",
    ),
    (
        "temperature ignored",
        "train/grpo",
        " temperature=cfg.temperature,",
        "",
        "test_exact.py::test_configuration_reaches_trl",
    ),
    (
        "num_iterations ignored",
        "train/grpo",
        " num_iterations=cfg.num_iterations,",
        "",
        "test_exact.py::test_configuration_reaches_trl",
    ),
    (
        "GRPO: the weight of labels without lambda_cx",
        "train/grpo",
        "chexbert=cfg.lambda_clin * cfg.lambda_cx",
        "chexbert=cfg.lambda_clin",
        "test_exact.py::test_weights_of_the_grpo_baseline",
    ),
    (
        "GRPO: the weight of entities is that of labels",
        "train/grpo",
        "radgraph=cfg.lambda_clin * cfg.lambda_rg",
        "radgraph=cfg.lambda_clin * cfg.lambda_cx",
        "test_exact.py::test_weights_of_the_grpo_baseline",
    ),
    (
        "stages' steps swapped",
        "train/grpo",
        "(cfg.stage1_steps, cfg.stage1_modules), (cfg.stage2_steps, cfg.stage2_modules)",
        "(cfg.stage2_steps, cfg.stage1_modules), (cfg.stage1_steps, cfg.stage2_modules)",
        "test_exact.py::test_stages_have_their_own_steps_modules_and_seeds",
    ),
    (
        "both stages on one seed",
        "train/grpo",
        "10 * cfg.seed + stage",
        "10 * cfg.seed",
        "test_exact.py::test_stages_have_their_own_steps_modules_and_seeds",
    ),
    (
        "k counts evaluations as well",
        "train/grpo",
        'if self.model.training: self.state.stateful_callbacks["k"]',
        'self.state.stateful_callbacks["k"]',
        "test_exact.py::test_k_counts_training_generations_alone",
    ),
    (
        "located F1: mislocated findings are not missed",
        "metrics/statistics",
        'c["mislocated"] + c["missed"], c["mislocated"]',
        'c["missed"], c["mislocated"]',
        "test_exact.py::test_columns_of_planted_findings",
    ),
    (
        "located F1 of one report: the same",
        "data/phantom",
        '2 * counts["mislocated"]',
        'counts["mislocated"]',
        "test_exact.py::test_a_finding_in_the_wrong_place_is_an_error_and_a_miss",
    ),
    (
        "abnormal recall counts what is mentioned",
        "metrics/statistics",
        '{"positive": 1, "negative": 0, "class": 2}[uncertain], 0))',
        '{"positive": 1, "negative": 0, "class": 2}[uncertain], labels == 0))',
        "test_exact.py::test_abnormal_recall_counts_what_is_present",
    ),
    (
        "seeds are not drawn (runs, tables, attention: one bootstrap)",
        "metrics/statistics",
        "study_draws(len(each), n_boot, seed + 1) / len(each)",
        "np.full((n_boot, len(each)), 1 / len(each))",
        "test_exact.py::test_every_bootstrap_draws_the_seeds_anew",
    ),
    (
        "p is lost where a draw is undefined",
        "metrics/statistics",
        "    gaps = gaps[~np.isnan(gaps)]\n    return min",
        "    return min",
        "test_exact.py::test_one_bootstrap_for_valor_evaluate_and_the_tables",
    ),
    (
        "uncertain counts as there, whatever the option",
        "metrics/statistics",
        '"negative": 0',
        '"negative": 1',
        "test_exact.py::test_runs_and_valor_evaluate_count_uncertain_alike",
    ),
    (
        "convergence is judged on the last update",
        "metrics/convergence",
        "last=log.tail(window).mean()",
        "last=log.tail(1).mean()",
        "test_exact.py::test_convergence_is_judged_on_ten_updates",
    ),
]


def killed(module, old, new, test):
    "Whether `test` fails on a copy of the package with the fault in it, in a process forked from this one (which has imported what takes long)."
    with tempfile.TemporaryDirectory() as home:
        for part in ("valor", "tests"):
            shutil.copytree(ROOT / part, f"{home}/{part}", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / name, home)
        path = Path(home) / "valor" / f"{module}.py"
        text = path.read_text()
        if text.count(old) != 1:
            raise SystemExit(
                f"{module}.py holds {text.count(old)} times {old!r}; expected once: bring tests/mutants.py up to date"
            )
        path.write_text(text.replace(old, new))
        child = os.fork()
        if not child:
            os._exit(tested(home, test))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, 1):
            raise SystemExit(f"{test} could not be run (exit status {code})")
        return code == 1


def tested(home, test):
    "pytest's exit status for `test` on the package in `home`: 0 passed, 1 failed."
    os.chdir(home)
    sys.path.insert(0, home)
    with (
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"tests/{test}"]))
    import valor

    return code if Path(valor.__file__).is_relative_to(home) else 9


if __name__ == "__main__":
    chosen = [m for m in MUTANTS if len(sys.argv) < 2 or sys.argv[1].lower() in m[0].lower()]
    survived = []
    for name, *fault in tqdm(chosen, desc="mutants"):
        if not killed(*fault):
            survived.append(name)
        tqdm.write(f"{'SURVIVED' if name in survived else 'killed'}: {name}")
    sys.exit(f"{len(survived)} of {len(chosen)} survived: {'; '.join(survived)}" if survived else 0)
