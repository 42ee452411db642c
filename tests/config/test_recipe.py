"""Recipes: what the files hold, what they may hold, and what flags do to them."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from fast_spatial.config import recipes
from fast_spatial.config.commands import ReproduceConfig
from fast_spatial.config.fields import as_typed, flag, identity, parse
from fast_spatial.config.rows import requests
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.reproduce import requested_rows
from fast_spatial.training.schedule import side_starts

RUN = {"data": "d", "out": "o", "mode": "worst10"}
DIGITS_VALUES = {
    "image_size": 32,
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
    assert recipes.names() == ["reference", "fast", "digits", "digits_linear"]


def test_the_reference_is_the_defaults_and_names_all_that_decides_numbers_but_the_attack_and_the_pilots():
    values = recipes.load("reference")
    defaults = parse(TrainConfig, RUN)
    assert {name: getattr(defaults, name) for name in values} == values
    unnamed = {"mode", "degrees", "translate_px", "views", "seed", "max_classes", "max_train_images", "deterministic"}
    assert identity(defaults).keys() - values.keys() == unnamed | {"grad_accum_steps", "score_size"}


@pytest.mark.parametrize("name", recipes.names())
def test_every_value_of_a_file_is_explained(name):
    for line in (recipes.FOLDER / f"{name}.toml").read_text().splitlines():
        if line and not line.startswith("#"):
            value, _, comment = line.partition("#")
            assert tomllib.loads(value)
            assert len(comment.split()) >= 2, line


@pytest.mark.parametrize("epochs", [16, 88])
def test_the_fast_recipe_takes_any_number_of_epochs(epochs):
    training = recipes.train_config({**RUN, "recipe": "fast", "epochs": str(epochs)})
    assert (training.epochs, training.lr, training.global_batch_size) == (epochs, 2.0, 1024)
    assert side_starts(training) == [(0.0, 160), (0.75, 192)]
    assert not training.blurpool and not training.eval_flip


def test_the_list_of_recipes_says_what_each_is_for_and_what_it_sets():
    text = recipes.describe()
    lines = text.splitlines()
    assert len(lines) <= 20 and max(map(len, lines)) <= 120
    assert [line.split(":")[0] for line in lines if re.match(r"\w+: ", line)] == recipes.names()
    values = {flag(key): as_typed(value) for key, value in recipes.load("fast").items()}
    fast = text[text.index("fast:") : text.index("digits:")]
    given = dict(word.split("=") for word in fast.split() if word.startswith("--"))
    assert given.items() <= values.items()
    assert {"--lr": "2", "--epochs": "16", "--image-size": "192"}.items() <= given.items()


@pytest.mark.parametrize("epochs", [16, 24, 32, 40, 56, 88])
def test_a_recipe_that_is_gone_is_refused_naming_what_replaces_it(epochs):
    with pytest.raises(UserError, match=rf"^--recipe e{epochs}: replaced by --recipe fast --epochs {epochs}$"):
        recipes.train_config({**RUN, "recipe": f"e{epochs}"})
    assert recipes.todays_flags({"recipe": f"e{epochs}"}) == {"recipe": "fast", "epochs": str(epochs)}


@pytest.mark.parametrize(
    ("recorded", "today"),
    [
        (
            "launch.py train --side 64 --accumulate=2 --out side",
            "launch.py train --image-size 64 --grad-accum-steps=2 --out side",
        ),
        ("launch.py train --start_side 48 --lr 0.1", "launch.py train --start-size 48 --lr 0.1"),
        ("launch.py train --recipe e24 --views 2", "launch.py train --recipe fast --epochs 24 --views 2"),
        ("launch.py train --recipe=e16", "launch.py train --recipe fast --epochs 16"),
        ("launch.py train --recipe e24.toml --out 'a --side'", "launch.py train --recipe e24.toml --out 'a --side'"),
        ("launch.py train --recipe fast", "launch.py train --recipe fast"),
    ],
)
def test_a_recorded_command_is_shown_as_it_is_typed_today(recorded, today):
    assert recipes.todays_command(recorded) == today


@pytest.mark.parametrize(
    ("recipe", "epochs", "words"),
    [
        ("fast", 16, "fast"),
        ("fast", 24, "fast --epochs 24"),
        ("e24", 24, "fast --epochs 24"),
        ("reference", 110, "reference"),
        ("reference", 30, "reference --epochs 30"),
        ("gone.toml", 30, "gone.toml"),
    ],
)
def test_a_recipe_is_shown_with_epochs_that_are_not_its_own(recipe, epochs, words):
    assert recipes.recipe_as_typed(recipe, epochs) == words


def test_the_digits_have_the_recipe_that_their_published_results_were_made_with():
    config, defaults = recipes.train_config({**RUN, "data": "digits"}), parse(TrainConfig, RUN)
    changed = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(defaults, f.name)
    }
    assert changed == {"data": "digits", "recipe": "digits", **DIGITS_VALUES}


def test_flags_override_a_recipe_even_with_the_defaults():
    given = {"epochs": "110", "image_size": "64", "milestones": "30,60,85,95,105"}
    config = recipes.train_config({**RUN, "data": "digits", **given})
    assert (config.epochs, config.image_size, config.milestones) == (110, 64, (30, 60, 85, 95, 105))
    assert config.global_batch_size == 64


def test_a_recipe_that_is_named_replaces_the_one_of_the_data():
    config = recipes.train_config({**RUN, "data": "digits", "recipe": "reference"})
    assert (config.epochs, config.image_size) == (110, 224)


def test_a_file_of_ones_own_is_taken(tmp_path):
    own = write(tmp_path, "epochs = 3\nlr = 1\njitter = [0, 0.5, 0]\narch = 'resnet34'\n")
    config = recipes.train_config({**RUN, "recipe": own})
    assert (config.epochs, config.lr, config.jitter, config.arch) == (3, 1.0, (0.0, 0.5, 0.0), "resnet34")
    assert type(config.lr) is type(config.jitter[0]) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "epoch: no such option"),
        ("side = 32", "side: renamed to image_size"),
        ("mode = 'random'", "mode: not allowed in a recipe; give it as a flag"),
        ("workers = 3", "workers: not allowed in a recipe; give it as a flag"),
        ("epochs = 3.5", "epochs = 3.5: expected a whole number"),
        ("epochs = true", "epochs = True: expected a whole number"),
        ("lr = 'fast'", "lr = fast: expected a finite number"),
        ("lr = nan", "lr = nan: expected a finite number"),
        ("blurpool = 1", "blurpool = 1: expected true or false"),
        ("arch = 18", "arch = 18: expected a text in quotes"),
        ("jitter = [0.1, 0.1]", "jitter = [0.1, 0.1]: expected an array of 3 numbers"),
        ("milestones = [1, 2.5]", "milestones = 2.5: expected a whole number"),
        ("milestones = 3", "milestones = 3: expected an array of numbers"),
        ("milestones = [5, 3]", "milestones = 5,3: must increase"),
        ("global_batch_size = 0", "global_batch_size = 0: must be at least 1"),
        ("schedule = 'cosine'", "schedule = cosine: choose one of milestones, linear"),
        ("epochs = ", "invalid TOML ("),
    ],
)
def test_a_bad_file_is_refused_naming_it_and_the_key(tmp_path, text, message):
    own = write(tmp_path, text)
    with pytest.raises(UserError, match=r"^--recipe .*\n") as caught:
        recipes.train_config({**RUN, "recipe": own})
    assert str(caught.value).startswith(f"--recipe {own}: {message}")


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError, match=r"--recipe e17: no such recipe or file\nchoose one of reference, fast"):
        recipes.train_config({**RUN, "recipe": "e17"})


def test_a_reproduction_takes_a_recipe_and_judges_as_it_says():
    config = ReproduceConfig(data="d", out="o", rows=("standard",))
    rows = requested_rows(requests(config, {"recipe": "fast", "eval_flip": "true"}))
    (row,) = rows
    assert (row.train.epochs, row.train.eval_size, row.evaluate.flip) == (16, 224, True)


def test_the_installed_package_brings_its_recipes():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["fast_spatial.config"] == ["recipes/*.toml"]
    assert {path.name for path in recipes.FOLDER.iterdir()} == {f"{name}.toml" for name in recipes.names()}
