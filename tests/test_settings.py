"""What the command line says of itself: versions, every setting with its meaning, and the nearest word for a
misspelt one, all before any large library is imported."""

import dataclasses
import re
import subprocess
import sys

import pytest

from valor.cli import main
from valor.config import PRESETS, Config, preset
from valor.settings import all_settings


def said(capsys, *words):
    main([*words])
    return capsys.readouterr().out


def refused(capsys, *words):
    "The last line of what a refused command says."
    with pytest.raises(SystemExit) as end:
        main([*words])
    return (capsys.readouterr().err.splitlines() or [""])[-1] or str(end.value)


def test_version_names_package_and_libraries(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and re.match(r"valor \d+\.\d+\.\d+( \(commit \S+\))?\npython 3", text)
    assert "transformers" in text and "trl" in text


def test_config_explains_every_setting(capsys):
    page = said(capsys, "config")
    for field in dataclasses.fields(Config):
        assert re.search(rf"^  {field.name} = ", page, re.M), field.name
        assert len(all_settings()[field.name].meaning) > 5, f"{field.name}: say in a comment what it is"
    assert "[see the paper, §5.1]" in page and "[ours: the paper does not give it]" in page
    for name in PRESETS:
        assert f"  {name}: " in page


def test_config_shows_presets_and_changes(capsys):
    assert f"lr = {preset('paper').lr!r}   (default 0.0007)" in said(capsys, "config", "--preset", "paper")
    page = said(capsys, "config", "sections", "--set", "benchmark=r2gen_iu", "--set", "data_root=.")
    assert "sections = 'report'   (default 'both')" in page and "lambda_vis" not in page


@pytest.mark.parametrize(
    "words, message",
    [
        (("config", "lamda_vis"), "unknown parameter lamda_vis; did you mean 'lambda_vis'?"),
        (("trian",), "did you mean 'train'?"),
        (("train", "--until", "stage3"), "did you mean 'stage2'?"),
        (("run", "--preest", "smoke"), "did you mean '--preset'?"),
        (("run", "--preset", "smok"), "did you mean 'smoke'?"),
        (("run", "--set", "visual=trueth"), "did you mean 'truth'?"),
        (("run", "--set", "benchmark=openi_renderd"), "did you mean 'openi_rendered'?"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(words, message, capsys):
    assert message in refused(capsys, *words)


def test_a_word_like_no_other_gets_no_advice(capsys):
    assert "did you mean" not in refused(capsys, "run", "--set", "visual=qqqq")


@pytest.mark.parametrize("words", [["run", "--help"], ["config"], ["--version"]])
def test_nothing_large_is_imported_for_it(words):
    heavy = "('torch', 'transformers', 'pandas', 'numpy')"
    code = f"import sys; from valor.cli import main\ntry: main({words})\nexcept SystemExit: pass\n"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_presets(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: " in text for name in PRESETS)


def test_a_reader_who_has_enough_is_no_error():
    line = f"{sys.executable} -m valor config | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("The run as a whole") and done.stderr == ""
    line = f"{sys.executable} -m valor config lr | true"  # so short that it is written as the command ends
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stderr == ""
