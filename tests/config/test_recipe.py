"""Recipes: what the files hold, what they may hold, and what flags do to them."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from fast_spatial.config import recipes
from fast_spatial.config.commands import ReproduceConfig
from fast_spatial.config.fields import identity, parse
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.reproduce import plan
from fast_spatial.training.schedule import side_starts

RUN = {"data": "d", "out": "o", "mode": "worst10"}
LADDER = ("e16", "e24", "e32", "e40", "e56", "e88")
DIGITS_VALUES = {
    "side": 32,
    "epochs": 8,
    "global_batch_size": 64,
    "lr": 0.02,
    "milestones": (5, 7),
    "crop_scale": (0.7, 1.0),
    "flip_prob": 0.0,
    "eval_every": 4,
}


def write(folder: Path, text: str) -> str:
    path = folder / "own.toml"
    path.write_text(text)
    return str(path)


def test_these_come_with_the_project():
    assert recipes.names() == ["reference", *LADDER, "digits", "digits_linear"]


def test_the_reference_is_the_defaults_and_names_all_that_decides_numbers_but_the_attack_and_the_pilots():
    values = recipes.load("reference")
    defaults = parse(TrainConfig, RUN)
    assert {name: getattr(defaults, name) for name in values} == values
    unnamed = {"mode", "degrees", "translate_px", "views", "seed", "classes", "max_train_images", "deterministic"}
    assert identity(defaults).keys() - values.keys() == unnamed | {"accumulate", "score_side"}


@pytest.mark.parametrize("name", recipes.names())
def test_every_value_of_a_file_is_explained(name):
    for line in (recipes.FOLDER / f"{name}.toml").read_text().splitlines():
        if line and not line.startswith("#"):
            value, _, comment = line.partition("#")
            assert tomllib.loads(value)
            assert len(comment.split()) >= 2, line


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder_differs_in_its_epochs_alone(name):
    values = recipes.load(name)
    assert values.pop("epochs") == int(name[1:])
    first = recipes.load("e16")
    del first["epochs"]
    assert values == first
    training = recipes.train_config({**RUN, "recipe": name})
    assert (training.lr, training.global_batch_size) == (2.0, 1024)
    assert side_starts(training) == [(0.0, 160), (0.75, 192)]
    assert not training.blurpool and not training.eval_flip


def test_the_digits_have_the_recipe_that_their_published_results_were_made_with():
    config, defaults = recipes.train_config({**RUN, "data": "digits"}), parse(TrainConfig, RUN)
    changed = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(defaults, f.name)
    }
    assert changed == {"data": "digits", "recipe": "digits", **DIGITS_VALUES}


def test_flags_override_a_recipe_even_with_the_defaults():
    given = {"epochs": "110", "side": "64", "milestones": "30,60,85,95,105"}
    config = recipes.train_config({**RUN, "data": "digits", **given})
    assert (config.epochs, config.side, config.milestones) == (110, 64, (30, 60, 85, 95, 105))
    assert config.global_batch_size == 64


def test_a_recipe_that_is_named_replaces_the_one_of_the_data():
    config = recipes.train_config({**RUN, "data": "digits", "recipe": "reference"})
    assert (config.epochs, config.side) == (110, 224)


def test_a_file_of_ones_own_is_taken(tmp_path):
    own = write(tmp_path, "epochs = 3\nlr = 1\njitter = [0, 0.5, 0]\narch = 'resnet34'\n")
    config = recipes.train_config({**RUN, "recipe": own})
    assert (config.epochs, config.lr, config.jitter, config.arch) == (3, 1.0, (0.0, 0.5, 0.0), "resnet34")
    assert type(config.lr) is type(config.jitter[0]) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "epoch: no such option"),
        ("mode = 'random'", "mode: it is no part of a recipe; give it as a flag"),
        ("workers = 3", "workers: it is no part of a recipe; give it as a flag"),
        ("epochs = 3.5", "epochs = 3.5: expected a whole number"),
        ("epochs = true", "epochs = True: expected a whole number"),
        ("lr = 'fast'", "lr = fast: expected a finite number"),
        ("lr = nan", "lr = nan: expected a finite number"),
        ("blurpool = 1", "blurpool = 1: expected true or false"),
        ("arch = 18", "arch = 18: expected a text in quotes"),
        ("jitter = [0.1, 0.1]", "jitter = [0.1, 0.1]: expected an array of 3 numbers"),
        ("milestones = [1, 2.5]", "milestones = 2.5: expected a whole number"),
        ("milestones = 3", "milestones = 3: expected an array of numbers"),
        ("milestones = [5, 3]", "milestones = 5,3: they must increase"),
        ("global_batch_size = 0", "global_batch_size = 0: it must be at least 1"),
        ("schedule = 'cosine'", "schedule = cosine: choose one of milestones, linear"),
        ("epochs = ", "it is no TOML file"),
    ],
)
def test_a_bad_file_is_refused_naming_it_and_the_key(tmp_path, text, message):
    own = write(tmp_path, text)
    with pytest.raises(UserError, match=r"^--recipe .*\n") as caught:
        recipes.train_config({**RUN, "recipe": own})
    assert str(caught.value).startswith(f"--recipe {own}: {message}")


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError, match=r"--recipe e17: there is no such file\nchoose one of reference, e16"):
        recipes.train_config({**RUN, "recipe": "e17"})


def test_a_reproduction_takes_a_recipe_and_judges_as_it_says():
    rows = plan(ReproduceConfig(data="d", out="o", rows=("standard",)), {"recipe": "e16", "eval_flip": "true"})
    (row,) = rows
    assert (row.train.epochs, row.train.eval_side, row.evaluate.flip) == (16, 224, True)


def test_the_installed_package_brings_its_recipes():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"] == {"fast_spatial.config": ["recipes/*.toml"]}
    assert {path.name for path in recipes.FOLDER.iterdir()} == {f"{name}.toml" for name in recipes.names()}
