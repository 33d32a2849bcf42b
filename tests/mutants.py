"""Puts one fault at a time into a copy of the package and checks that a test fails.

By hand, not part of `make test`, a few seconds for each mutant: python tests/mutants.py [PART OF A NAME]
A mutant that survives means that its test does not see the fault. Your checkout stays as it is."""

import contextlib
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
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


@dataclass
class Mutant:
    name: str
    module: str  # of the package, without .py
    before: str  # a text that occurs once in the module
    after: str  # the fault: what replaces it
    test: str  # in tests/; fails if it sees the fault


MUTANTS = [
    Mutant(
        name="Eq. 4: lambda_cx and lambda_rg swapped",
        module="rewards/compose",
        before="cfg.lambda_cx, cfg.lambda_rg)",
        after="cfg.lambda_rg, cfg.lambda_cx)",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="Eq. 4: swapped inside",
        module="rewards/compose",
        before='check_weight("lambda_cx", lambda_cx) * cx + check_weight("lambda_rg", lambda_rg) * rg',
        after='check_weight("lambda_cx", lambda_cx) * rg + check_weight("lambda_rg", lambda_rg) * cx',
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="Eq. 3: lambda_lex and lambda_sem swapped",
        module="rewards/compose",
        before="cfg.lambda_lex, cfg.lambda_sem)",
        after="cfg.lambda_sem, cfg.lambda_lex)",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="Eq. 3: swapped inside",
        module="rewards/compose",
        before="return lambda_lex * (bleu + rouge) + lambda_sem * bert",
        after="return lambda_sem * (bleu + rouge) + lambda_lex * bert",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="Eq. 5: lambda_clin dropped",
        module="rewards/compose",
        before="return ver + lambda_clin * clin",
        after="return ver + clin",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="Eq. 3: its extra rewards left out",
        module="rewards/compose",
        before="    ver = ver + sum_of_extras(scores, own, equation=3)\n",
        after="",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="Eq. 3: another equation's extra rewards",
        module="rewards/compose",
        before="sum_of_extras(scores, own, equation=3)",
        after="sum_of_extras(scores, own, equation=8)",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="Eq. 8: its extra rewards left out",
        module="rewards/compose",
        before="    reward = reward + sum_of_extras(scores, own, equation=8)\n",
        after="",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="Eq. 7: the worst report is ranked first",
        module="rewards/ranknorm",
        before="(others > mine)",
        after="(others < mine)",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="Eq. 7: rank instead of rank - 1",
        module="rewards/ranknorm",
        before="1 - (rank - 1) /",
        after="1 - rank /",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="Eq. 8: weights of text and image swapped",
        module="rewards/compose",
        before="(1 - lambda_vis) * text + lambda_vis * vis",
        after="lambda_vis * text + (1 - lambda_vis) * vis",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="Eq. 9: sign",
        module="rewards/ranknorm",
        before="return 2 * r - 1",
        after="return 1 - 2 * r",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="extra rewards without their weights",
        module="rewards/compose",
        before="sum(weight * scores[name]",
        after="sum(scores[name]",
        test="test_exact.py::test_composite_reward_by_hand",
    ),
    Mutant(
        name="epsilon ignored",
        module="train/grpo",
        before="        epsilon=cfg.epsilon,\n",
        after="",
        test="test_exact.py::test_configuration_reaches_trl",
    ),
    Mutant(
        name="temperature ignored",
        module="train/grpo",
        before=" temperature=cfg.temperature,",
        after="",
        test="test_exact.py::test_configuration_reaches_trl",
    ),
    Mutant(
        name="num_iterations ignored",
        module="train/grpo",
        before=" num_iterations=cfg.num_iterations,",
        after="",
        test="test_exact.py::test_configuration_reaches_trl",
    ),
    Mutant(
        name="GRPO: the weight of labels without lambda_cx",
        module="train/grpo",
        before="chexbert=cfg.lambda_clin * cfg.lambda_cx",
        after="chexbert=cfg.lambda_clin",
        test="test_exact.py::test_weights_of_the_grpo_baseline",
    ),
    Mutant(
        name="GRPO: the weight of entities is that of labels",
        module="train/grpo",
        before="radgraph=cfg.lambda_clin * cfg.lambda_rg",
        after="radgraph=cfg.lambda_clin * cfg.lambda_cx",
        test="test_exact.py::test_weights_of_the_grpo_baseline",
    ),
    Mutant(
        name="stages' steps swapped",
        module="train/grpo",
        before="(cfg.stage1_steps, cfg.stage1_modules), (cfg.stage2_steps, cfg.stage2_modules)",
        after="(cfg.stage2_steps, cfg.stage1_modules), (cfg.stage1_steps, cfg.stage2_modules)",
        test="test_exact.py::test_stages_have_their_own_steps_modules_and_seeds",
    ),
    Mutant(
        name="both stages on one seed",
        module="train/grpo",
        before="10 * cfg.seed + stage",
        after="10 * cfg.seed",
        test="test_exact.py::test_stages_have_their_own_steps_modules_and_seeds",
    ),
    Mutant(
        name="k counts evaluations as well",
        module="train/grpo",
        before='        if self.model.training:\n            self.state.stateful_callbacks["k"]',
        after='        if True:\n            self.state.stateful_callbacks["k"]',
        test="test_exact.py::test_k_counts_training_generations_alone",
    ),
    Mutant(
        name="located F1: mislocated findings are not missed",
        module="metrics/statistics",
        before='c["mislocated"] + c["missed"],',
        after='c["missed"],',
        test="test_exact.py::test_columns_of_planted_findings",
    ),
    Mutant(
        name="located F1 of one report: the same",
        module="data/phantom",
        before='2 * counts["mislocated"]',
        after='counts["mislocated"]',
        test="test_exact.py::test_a_finding_in_the_wrong_place_is_an_error_and_a_miss",
    ),
    Mutant(
        name="erased: the finding that is to go is painted",
        module="data/pairs",
        before="_aside(shown) if gone else shown",
        after="shown",
        test="test_erased.py::test_an_erased_finding_leaves_nothing_behind",
    ),
    Mutant(
        name="erased: the finding that is to go takes no random numbers",
        module="data/pairs",
        before="    for f in settled:\n",
        after="    for f in left:\n",
        test="test_erased.py::test_nothing_changes_outside_the_region_and_others_keep_their_boxes",
    ),
    Mutant(
        name="erased: other findings move with the anatomy",
        module="data/pairs",
        before="phantom._anatomy(settled, again)), []",
        after="phantom._anatomy(left, again)), []",
        test="test_erased.py::test_nothing_changes_outside_the_region_and_others_keep_their_boxes",
    ),
    Mutant(
        name="erased: exactly, whatever the others do",
        module="metrics/erased",
        before="left, others, left and others, invented",
        after="left, others, left, invented",
        test="test_erased.py::test_reports_of_a_pair",
    ),
    Mutant(
        name="abnormal recall counts what is mentioned",
        module="metrics/statistics",
        before='"class": 2}[uncertain], 0)\n',
        after='"class": 2}[uncertain], labels == 0)\n',
        test="test_exact.py::test_abnormal_recall_counts_what_is_present",
    ),
    Mutant(
        name="seeds are not drawn (runs, tables, attention: one bootstrap)",
        module="metrics/bootstrap",
        before="taken = study_draws(len(each), n_boot, seed + 1).astype(int)",
        after="taken = np.ones((n_boot, len(each)), int)",
        test="test_exact.py::test_every_bootstrap_draws_the_seeds_anew",
    ),
    Mutant(
        name="p is lost where a draw is undefined",
        module="metrics/bootstrap",
        before="    gaps = gaps[~np.isnan(gaps)]\n    if not",
        after="    if not",
        test="test_exact.py::test_one_bootstrap_for_valor_evaluate_and_the_tables",
    ),
    Mutant(
        name="uncertain counts as there, whatever the option",
        module="metrics/statistics",
        before='"negative": 0',
        after='"negative": 1',
        test="test_exact.py::test_runs_and_valor_evaluate_count_uncertain_alike",
    ),
    Mutant(
        name="convergence is judged on the last update",
        module="metrics/convergence",
        before="last=log.tail(window).mean()",
        after="last=log.tail(1).mean()",
        test="test_exact.py::test_convergence_is_judged_on_ten_updates",
    ),
    Mutant(
        name="omission: validation and test references leave findings out too",
        module="data/benchmarks",
        before='omit if split == "train" else 0.0',
        after="omit",
        test="test_effect.py::test_only_training_references_leave_findings_out",
    ),
    Mutant(
        name="omission: plain findings are left out more often than subtle ones",
        module="data/phantom",
        before="omit + difference if is_subtle(finding) else omit - difference",
        after="omit - difference if is_subtle(finding) else omit + difference",
        test="test_effect.py::test_references_leave_out_what_they_say_and_subtle_findings_more_often",
    ),
    Mutant(
        name="omission: the base is warmed up on planted truth",
        module="runs/makers",
        before='zip(row["truth"], from_truth(row["truth"])) if f.where in places]',
        after='zip(row["truth"], from_truth(row["truth"]))]',
        test="test_effect.py::test_the_base_is_told_no_more_than_the_references",
    ),
    Mutant(
        name="the placebo sees the study's own image",
        module="expert/controls",
        before='study_images(dataset[partner[row["study_id"]]])',
        after="study_images(row)",
        test="test_effect.py::test_stage_2_is_rewarded_by_what_the_configuration_names",
    ),
    Mutant(
        name="the visual reward sees the main image alone",
        module="expert/controls",
        before="[study_images(row) for row in rows]",
        after="[study_images(row)[:1] for row in rows]",
        test="test_two_images.py::test_the_visual_reward_is_the_mean_over_both_images",
    ),
    Mutant(
        name="evaluate-on: the form of a thinking policy is not judged",
        module="runs/transfer",
        before="judge_form(frame, written, cfg.reasoning).to_csv",
        after="frame.to_csv",
        test="test_thoughts.py::test_evaluate_on_judges_the_form_that_was_asked_for",
    ),
    Mutant(
        name="data, base and expert do not follow the seed",
        module="config",
        before="return cfg.seed + (101 if",
        after="return 0 + (101 if",
        test="test_effect.py::test_the_seed_drives_data_base_and_expert_unless_theirs_is_given",
    ),
    Mutant(
        name="all seeds are scored on the first seed's references",
        module="results/tables",
        before='by_seed = {c.seed: list(load_data(phase_folder("data", c))',
        after='by_seed = {c.seed: list(load_data(phase_folder("data", cfgs[0]))',
        test="test_effect.py::test_each_seed_is_scored_on_its_own_references",
    ),
    Mutant(
        name="seeds: a p-value that looks at one side",
        module="metrics/seeds",
        before="np.abs(rows @ signs.T), np.abs(",
        after="rows @ signs.T, np.abs(",
        test="test_seeds.py::test_sign_flips_give_the_p_of_scipys_permutation_test",
    ),
    Mutant(
        name="seeds: rounding decides whether two sums are equal",
        module="metrics/seeds",
        before="observed - rounding",
        after="observed",
        test="test_seeds.py::test_sign_flips_by_hand",
    ),
    Mutant(
        name="seeds: a rerun is as certain as a mean",
        module="metrics/seeds",
        before="(1 + 1 / np.shape(values)[-1]) ** 0.5",
        after="(1 / np.shape(values)[-1]) ** 0.5",
        test="test_seeds.py::test_a_rerun_lies_in_its_interval_as_often_as_promised",
    ),
    Mutant(
        name="seeds: seeds are not drawn",
        module="metrics/seeds",
        before="return np.take_along_axis(gaps, taken, 1).mean(1)",
        after="return gaps.mean(1)",
        test="test_seeds.py::test_seeds_that_share_a_test_set_share_the_drawn_studies",
    ),
    Mutant(
        name="seeds: studies of one test set are drawn for each seed",
        module="metrics/seeds",
        before="draw = crossed_draws if crossed else nested_draws",
        after="draw = nested_draws",
        test="test_seeds.py::test_seeds_that_share_a_test_set_share_the_drawn_studies",
    ),
    Mutant(
        name="seeds: two systems draw other studies",
        module="metrics/seeds",
        before="(measure(frame, draws, one) for frame in pair)",
        after="(measure(frame, d, one) for frame, d in zip(pair, (draws, draws[::-1])))",
        test="test_seeds.py::test_the_interval_is_paired_over_systems_and_fixed_by_its_seed",
    ),
    Mutant(
        name="seeds: Holm over all families at once",
        module="metrics/seeds",
        before="here = table.family == family",
        after="here = table.family == table.family",
        test="test_seeds.py::test_holm_runs_over_each_family_by_itself",
    ),
    Mutant(
        name="seeds: a table of another sidecar is read",
        module="metrics/seeds",
        before='!= about.get("sha256")',
        after='== ""',
        test="test_seeds.py::test_a_write_that_is_stopped_leaves_no_half",
    ),
    Mutant(
        name="seeds: seeds of other settings are put together",
        module="metrics/seeds",
        before="    _check_same(abouts)\n    return frames",
        after="    return frames",
        test="test_seeds.py::test_only_the_seed_may_differ",
    ),
]


def copy_of_package(home: str):
    "Copy what the tests need into the folder `home`."
    for part in ("valor", "tests"):
        shutil.copytree(ROOT / part, f"{home}/{part}", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, home)


def put_fault(mutant: Mutant, home: str):
    "Write the fault into the copy. Exits unless the text to replace occurs exactly once."
    path = Path(home) / "valor" / f"{mutant.module}.py"
    text = path.read_text()
    count = text.count(mutant.before)
    if count != 1:
        raise SystemExit(
            f"{mutant.module}.py has {mutant.before!r} {count} times, expected once: "
            f"bring {mutant.name!r} in tests/mutants.py up to date"
        )
    path.write_text(text.replace(mutant.before, mutant.after))


def killed(mutant: Mutant) -> bool:
    "Whether the mutant's test fails on a copy with the fault. A fork runs it, to save the imports."
    with tempfile.TemporaryDirectory() as home:
        copy_of_package(home)
        put_fault(mutant, home)
        child = os.fork()
        if not child:
            os._exit(tested(home, mutant.test))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1):
        raise SystemExit(f"{mutant.test} could not be run (exit status {code})")
    return code == 1


def tested(home: str, test: str) -> int:
    "pytest's exit status for `test` on the package in `home`: 0 passed, 1 failed, 9 not this package."
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


def main(part: str = ""):
    "Try all mutants whose name contains `part`. Exits with an error if one survives."
    chosen = [mutant for mutant in MUTANTS if part.lower() in mutant.name.lower()]
    survived = []
    for mutant in tqdm(chosen, desc="mutants"):
        if killed(mutant):
            tqdm.write(f"killed: {mutant.name}")
        else:
            tqdm.write(f"SURVIVED: {mutant.name}")
            survived.append(mutant.name)
    if survived:
        sys.exit(f"{len(survived)} of {len(chosen)} survived: {'; '.join(survived)}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
