"""A card beside every adapter and merged model; a push only where the data's terms allow it."""

import dataclasses
import json

import pytest
from huggingface_hub import ModelCard

from valor.cli import main
from valor.config import preset
from valor.runs import card


@pytest.fixture
def adapter(tmp_path):
    def make(**change):
        folder = tmp_path / "stage2-1" / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        cfg = dataclasses.replace(preset("smoke"), **change)
        (folder.parent / "config.json").write_text(json.dumps(dict(full=dataclasses.asdict(cfg))))
        return folder

    return make


class Hub:
    "In the place of the hub's client: it keeps what it is asked."

    asked = []

    def create_repo(self, repo, private, exist_ok):
        self.asked.append((repo, private))

    def upload_folder(self, repo_id, folder_path, allow_patterns):
        self.asked.append((repo_id, str(folder_path), allow_patterns))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(card, "HfApi", Hub)
    Hub.asked = []
    return Hub


def test_a_card_says_where_a_policy_comes_from(adapter):
    folder = adapter()
    card.write_card(folder)
    read = ModelCard.load(folder / "README.md")
    assert read.data.library_name == "peft" and read.data.pipeline_tag == "image-text-to-text"
    for part in ("made-up phantoms", "stand-ins", "Not for clinical use", "PeftModel", "`group_size` = 4"):
        assert part in read.text, part


def test_a_push_sends_weights_and_card_to_the_repository_that_is_named(adapter, hub, capsys):
    folder = adapter()
    main(["push", str(folder), "--repo", "mylab/policy"])
    (repo, private), (sent_to, sent, patterns) = hub.asked
    assert (repo, private, sent_to, sent) == ("mylab/policy", True, "mylab/policy", str(folder))
    assert "*.gz" not in patterns and "*.csv" not in patterns and (folder / "README.md").exists()
    assert "mylab/policy: pushed" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", ["mimic_cxr_jpg", "r2gen_mimic", "table"])
def test_what_restricted_data_taught_is_not_pushed(adapter, hub, benchmark):
    with pytest.raises(SystemExit, match="its terms do not allow a push"):
        main(["push", str(adapter(benchmark=benchmark)), "--repo", "mylab/policy"])
    assert hub.asked == []


def test_a_merged_model_keeps_its_origin(adapter, hub, tmp_path):
    folder, merged = adapter(benchmark="mimic_cxr_jpg"), tmp_path / "merged"
    merged.mkdir()
    card.write_card(merged, of=folder)
    (merged / "README.md").read_text().index("AutoModelForImageTextToText")
    with pytest.raises(SystemExit, match="its terms do not allow a push"):
        main(["push", str(merged), "--repo", "mylab/policy"])


def test_a_model_of_unknown_origin_is_not_pushed(tmp_path, hub):
    with pytest.raises(SystemExit, match="nothing says what it was trained on"):
        main(["push", str(tmp_path), "--repo", "mylab/policy"])
    with pytest.raises(SystemExit):
        main(["push", str(tmp_path)])  # without a repository
    assert hub.asked == []


def test_a_card_that_is_written_again_leaves_its_phase_whole(adapter):
    from valor.runs.phases import finish, inspect_phase

    folder, expected = adapter(), dict(phase="stage2")
    (folder.parent / "config.json").write_text(
        json.dumps(dict(full=dataclasses.asdict(preset("smoke")), config=expected))
    )
    (folder / "README.md").write_text("PEFT's own")
    finish(folder.parent)
    card.write_card(folder)
    assert inspect_phase(folder.parent, expected) == "finished"


def test_an_evaluation_of_another_checkpoint_is_not_on_the_card(tmp_path):
    "With `choose_by`, an evaluation may be of an earlier update than the adapter that the card describes."
    phase, evaluation = tmp_path / "stage2-1", tmp_path / "eval_stage2-1"
    phase.mkdir()
    evaluation.mkdir()
    (phase / "log.csv").write_text("k\n1\n2\n3\n")
    assert not card._of_last_update(evaluation, phase)  # not finished
    (evaluation / "done.json").write_text("{}")
    assert card._of_last_update(evaluation, phase)
    for k, last in ((2, False), (3, True)):
        (evaluation / "chosen.json").write_text(f'{{"by": "BLEU-4", "k": {k}}}')
        assert card._of_last_update(evaluation, phase) == last
