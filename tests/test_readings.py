"""The paper's other readings (`valor.config.READINGS`): each is a configuration that runs, changes the phases
that it should, and the table of what it moves says how it was made."""

import json

import numpy as np
import pandas as pd
import pytest

from valor.config import READINGS, preset, repo_root
from valor.data.images import PAD, square
from valor.runs.phases import fields_reaching

STATED = {
    "first version": dict(stage2_modules="projector"),
    "mmedpo": dict(lora_r=128, lora_alpha=256, lr_projector=2e-5, image_size=336),
    "editgrpo": dict(beta=0.01),
    "iu pairs": dict(benchmark="r2gen_iu", data_options=dict(preset="r2gen", view="first")),
}


def test_every_reading_is_a_configuration_with_its_source():
    assert set(READINGS) == set(STATED)
    for name, (settings, source) in READINGS.items():
        root = dict(data_root="iu_xray") if "benchmark" in settings else {}
        cfg = preset("paper", **settings, **root)
        for field, value in STATED[name].items():
            assert getattr(cfg, field) == value, (name, field)
        assert len(source) > 20


@pytest.mark.parametrize(
    "change, reached",
    [
        (dict(stage2_modules="projector"), {"stage2", "dpo"}),
        (dict(lr_projector=2e-5), {"stage2", "dpo"}),
        (dict(lora_r=128, lora_alpha=256), {"sft"}),
        (dict(beta=0.01), {"stage1"}),
        (dict(image_size=128), {"data"}),
    ],
)
def test_a_reading_reaches_the_phases_that_it_changes_and_those_after_them(change, reached):
    cfg, other = preset("smoke"), preset("smoke", **change)
    names = ("data", "expert", "base", "sft", "stage1", "stage2", "dpo")
    assert {n for n in names if fields_reaching(n, cfg) != fields_reaching(n, other)} == reached


def test_films_are_padded_to_336_pixels_and_nothing_is_cropped():
    film = np.full((200, 100), 200, np.uint8)
    film[0], film[-1] = 90, 90  # the uppermost and the lowest row
    pixels = np.asarray(square(film, 336))
    assert pixels.shape == (336, 336)
    assert (pixels[:, :80] == PAD).all() and (pixels[:, -80:] == PAD).all()  # on both sides, evenly
    assert pixels[0, 168] < 150 and pixels[-1, 168] < 150 and pixels[168, 168] == 200


def test_the_table_of_what_readings_move_says_how_it_was_made():
    folder = repo_root() / "figures"
    table = pd.read_csv(folder / "readings_smoke.csv")
    made = json.loads((folder / "readings_smoke.json").read_text())
    assert made["seeds"] == sorted(set(table.seed)) and len(made["seeds"]) > 1
    assert made["configuration"] and made["versions"]["torch"]
    assert all(computer["threads"] for computer in made["computed_on"])
    assert (table.groupby("reading").size() == len(made["seeds"])).all()
    assert table.settings.isna().sum() == len(made["seeds"])  # the default
