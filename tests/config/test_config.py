"""What can be asked for: the modes, the reference recipe, the types of the options and the limits on them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from fast_spatial import launcher
from fast_spatial.config.commands import EvaluateConfig, ReproduceConfig
from fast_spatial.config.fields import from_json, identity, parse, to_json
from fast_spatial.config.modes import MODES, PUBLISHED
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.loading import training_views
from fast_spatial.errors import UserError

TRAIN = {"data": "d", "out": "o", "mode": "worst10"}
EVALUATE = {"checkpoint": "c.pt", "data": "d"}

# Another value of every option of `train`, and whether it makes another run.
ANOTHER_RUN = {
    "mode": "random",
    "degrees": 40.0,
    "translate_px": 12.0,
    "views": 5,
    "epochs": 100,
    "global_batch_size": 128,
    "lr": 0.2,
    "schedule": "linear",
    "milestones": (30, 60),
    "gamma": 0.2,
    "momentum": 0.8,
    "weight_decay": 0.0,
    "bn_weight_decay": False,
    "label_smoothing": 0.1,
    "ema": 0.999,
    "optimizer": "apex",
    "arch": "resnet50",
    "blurpool": True,
    "image_size": 160,
    "start_size": 160,
    "eval_size": 256,
    "eval_flip": True,
    "crop_scale": (0.25, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip_prob": 0.0,
    "jitter": (0.1, 0.1, 0.2),
    "lighting": 0.0,
    "bn_group_size": 32,
    "grad_accum_steps": 2,
    "score_size": 128,
    "seed": 1,
    "max_classes": 100,
    "max_train_images": 1000,
    "deterministic": True,
}
SAME_RUN = {
    "decode": "cpu",
    "warp": "dali",
    "data": "elsewhere",
    "recipe": "fast",
    "out": "elsewhere",
    "dtype": "float32",
    "resume": "never",
    "checkpoint_every": "500",
    "on_bad_image": "skip",
    "max_bad_images": 3,
    "views_per_forward": 64,
    "compile": "false",
    "eval_every": 5,
    "log_every": 1,
    "profile": 10,
    "exclude": "exclude.txt",
    "hours": 2.0,
    "gpu_hours": 2.0,
    "max_cost": 2.0,
    "price": 2.0,
    "until": "18:00",
    "plan_only": True,
    "replay": "elsewhere",
    "nproc_per_node": 8,
    "nnodes": "2",
    "node_rank": 1,
    "rdzv_backend": "static",
    "rdzv_endpoint": "host:1",
    "rdzv_id": "another",
    "max_restarts": 3,
    "in_process": True,
    "stall_minutes": 5.0,
    "workers": 3,
}


def train_config(**raw: str) -> TrainConfig:
    return parse(TrainConfig, {**TRAIN, **raw})


@pytest.mark.parametrize(
    ("mode", "center", "views"),
    [
        ("nocrop", True, np.array([[0.0, 0.0]])),
        ("standard", False, np.array([[0.0, 0.0]])),
        ("random", False, np.array([[30, 24 / 224]])),
        ("worst10", False, np.array([[0, 0], *[[30, 24 / 224]] * 10])),
    ],
)
def test_a_mode_is_its_crop_and_its_views(mode, center, views):
    assert MODES[mode].center is center
    np.testing.assert_allclose(training_views(train_config(mode=mode)).rows(), views, rtol=1e-12, strict=True)


def test_there_are_four_modes():
    assert list(MODES) == ["nocrop", "standard", "random", "worst10"]


def test_worst10_has_as_many_random_views_as_asked_for_after_the_untouched_one():
    limits = training_views(train_config(views="3", degrees="40")).rows()
    np.testing.assert_allclose(limits, np.array([[0, 0], *[[40, 32 / 224]] * 3]), rtol=1e-12, strict=True)


def test_views_count_in_worst10_alone():
    assert train_config(mode="random", views="3").num_views == 1
    assert train_config(mode="standard", views="3").num_views == 1


@pytest.mark.parametrize(
    ("raw", "degrees", "translate_px"),
    [
        ({}, 30, 24),
        ({"degrees": "30"}, 30, 24),
        ({"degrees": "40"}, 40, 32),
        ({"degrees": "0"}, 0, 0),
        ({"degrees": "15", "translate_px": "12"}, 15, 12),
        ({"degrees": "0", "translate_px": "24"}, 0, 24),
        ({"translate_px": "0"}, 30, 0),
    ],
)
@pytest.mark.parametrize(("kind", "needed"), [(TrainConfig, TRAIN), (EvaluateConfig, EVALUATE)])
def test_translations_go_with_rotations_as_published_unless_they_are_given(kind, needed, raw, degrees, translate_px):
    limits = parse(kind, {**needed, **raw}).limits
    assert limits.degrees == degrees
    assert limits.translate == pytest.approx(translate_px / 224, rel=1e-12)


def test_the_defaults_are_the_reference_recipe():
    assert identity(train_config()) == {
        **{"mode": "worst10", "seed": 0, "arch": "resnet18", "image_size": 224},
        **{"degrees": 30.0, "translate_px": None, "views": 10},
        **{"epochs": 110, "global_batch_size": 256},
        **{"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0001},
        **{"milestones": [30, 60, 85, 95, 105], "gamma": 0.1},
        **{"crop_scale": [0.08, 1.0], "crop_ratio": [0.75, 4 / 3], "flip_prob": 0.5},
        **{"jitter": [0.1, 0.1, 0.1], "lighting": 0.05},
        **{"schedule": "milestones", "warmup_epochs": 0.0, "bn_weight_decay": True, "label_smoothing": 0.0, "ema": 0.0},
        **{"blurpool": False, "start_size": 0, "eval_size": 0, "eval_flip": False},
        **{"bn_group_size": 0, "grad_accum_steps": 1, "deterministic": False},
        **{"max_classes": 0, "max_train_images": 0, "score_size": 0},
    }


def test_the_published_table():
    assert PUBLISHED == {
        ("standard", 0): (71.3, 60.6, 39.9, 20.9),
        ("nocrop", 0): (65.4, 54.1, 30.5, 11.8),
        ("random", 30): (68.9, 68.0, 54.6, 38.1),
        ("random", 40): (68.3, 67.7, 54.9, 38.8),
        ("worst10", 30): (69.1, 68.0, 59.4, 48.1),
        ("worst10", 40): (68.6, 67.2, 59.3, 48.4),
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "7", 7),
        ("lr", "1e-3", 0.001),
        ("lr", "1", 1.0),
        ("data", "2012", "2012"),
        ("translate_px", "12", 12.0),
        ("milestones", "3", (3,)),
        ("milestones", "3,5", (3, 5)),
        ("milestones", " 3, 5 ", (3, 5)),
        ("milestones", "", ()),
        ("crop_scale", "0.5,1", (0.5, 1.0)),
        ("jitter", "0,0.25,1", (0.0, 0.25, 1.0)),
        ("deterministic", "true", True),
        ("deterministic", "False", False),
    ],
)
def test_texts_become_values_of_the_options_type(name, text, value):
    found = getattr(train_config(**{name: text}), name)
    assert found == value
    assert type(found) is type(value)


def test_what_is_not_given_has_its_default():
    assert train_config().translate_px is None
    assert parse(EvaluateConfig, EVALUATE).grid is True


@pytest.mark.parametrize(
    ("kind", "raw", "parts"),
    [
        (TrainConfig, {"epochs": "0"}, ["--epochs 0", "at least 1"]),
        (TrainConfig, {"epochs": "ten"}, ["--epochs ten", "a whole number"]),
        (TrainConfig, {"epochs": "1e2"}, ["--epochs 1e2", "a whole number"]),
        (TrainConfig, {"epochs": ""}, ["--epochs", "a whole number"]),
        (TrainConfig, {"global_batch_size": "0"}, ["--global-batch-size 0", "at least 1"]),
        (TrainConfig, {"grad_accum_steps": "0"}, ["--grad-accum-steps 0", "at least 1"]),
        (TrainConfig, {"views": "0"}, ["--views 0", "at least 1"]),
        (TrainConfig, {"log_every": "0"}, ["--log-every 0", "at least 1"]),
        (TrainConfig, {"image_size": "0"}, ["--image-size 0", "at least 1"]),
        (TrainConfig, {"lr": "fast"}, ["--lr fast", "a number"]),
        (TrainConfig, {"lr": "nan"}, ["--lr nan", "a finite number"]),
        (TrainConfig, {"lr": "-0.5"}, ["--lr -0.5", "at least 0"]),
        (TrainConfig, {"momentum": "-1"}, ["--momentum -1", "at least 0"]),
        (TrainConfig, {"weight_decay": "-1"}, ["--weight-decay -1", "at least 0"]),
        (TrainConfig, {"gamma": "-1"}, ["--gamma -1", "at least 0"]),
        (TrainConfig, {"lighting": "-1"}, ["--lighting -1", "at least 0"]),
        (TrainConfig, {"bn_group_size": "-1"}, ["--bn-group-size -1", "at least 0"]),
        (TrainConfig, {"views_per_forward": "-1"}, ["--views-per-forward -1", "at least 0"]),
        (TrainConfig, {"score_size": "224"}, ["--score-size 224", "below --image-size 224"]),
        (TrainConfig, {"score_size": "4"}, ["--score-size 4", "at least 8"]),
        (TrainConfig, {"compile": "yes"}, ["--compile yes", "auto, true, false"]),
        (TrainConfig, {"max_classes": "-1"}, ["--max-classes -1", "at least 0"]),
        (TrainConfig, {"max_train_images": "-1"}, ["--max-train-images -1", "at least 0"]),
        (TrainConfig, {"resume": "yes"}, ["--resume yes", "auto, never"]),
        (TrainConfig, {"on_bad_image": "ignore"}, ["--on-bad-image ignore", "stop, skip"]),
        (TrainConfig, {"max_bad_images": "-1"}, ["--max-bad-images -1", "at least 0"]),
        (TrainConfig, {"checkpoint_every": "15m"}, ["--checkpoint-every 15m", "15min"]),
        (TrainConfig, {"checkpoint_every": "-5"}, ["--checkpoint-every -5", "expected steps"]),
        (TrainConfig, {"checkpoint_every": ""}, ["--checkpoint-every", "expected steps"]),
        (TrainConfig, {"eval_every": "-1"}, ["--eval-every -1", "at least 0"]),
        (TrainConfig, {"profile": "-1"}, ["--profile -1", "at least 0"]),
        (TrainConfig, {"workers": "-1"}, ["--workers -1", "at least 0"]),
        (TrainConfig, {"nproc_per_node": "-1"}, ["--nproc-per-node -1", "at least 0"]),
        (TrainConfig, {"seed": "-1"}, ["--seed -1", "at least 0"]),
        (TrainConfig, {"seed": "2147483648"}, ["--seed 2147483648", "2147483647"]),
        (TrainConfig, {"mode": "fast"}, ["--mode fast", "nocrop, standard, random, worst10"]),
        (TrainConfig, {"optimizer": "adam"}, ["--optimizer adam", "sgd, apex"]),
        (TrainConfig, {"dtype": "int8"}, ["--dtype int8", "auto, bfloat16, float16, float32, tf32"]),
        (TrainConfig, {"degrees": "500"}, ["--degrees 500", "180"]),
        (TrainConfig, {"degrees": "-1"}, ["--degrees -1", "0"]),
        (TrainConfig, {"translate_px": "300"}, ["--translate-px 300", "224"]),
        (TrainConfig, {"translate_px": "-5"}, ["--translate-px -5", "0"]),
        (TrainConfig, {"milestones": "5,3"}, ["--milestones 5,3", "increase"]),
        (TrainConfig, {"milestones": "5,5"}, ["--milestones 5,5", "increase"]),
        (TrainConfig, {"milestones": "5,x"}, ["--milestones", "x", "a whole number"]),
        (TrainConfig, {"schedule": "cosine"}, ["--schedule cosine", "milestones, linear"]),
        (TrainConfig, {"warmup_epochs": "2"}, ["--warmup-epochs 2", "--schedule linear"]),
        (TrainConfig, {"schedule": "linear", "warmup_epochs": "110"}, ["--warmup-epochs 110", "below --epochs 110"]),
        (TrainConfig, {"label_smoothing": "1"}, ["--label-smoothing 1", "below 1"]),
        (TrainConfig, {"ema": "-0.1"}, ["--ema -0.1", "at least 0"]),
        (TrainConfig, {"start_size": "224"}, ["--start-size 224", "below --image-size 224"]),
        (TrainConfig, {"start_size": "150"}, ["--start-size 150", "a multiple of 16"]),
        (TrainConfig, {"start_size": "128", "score_size": "128"}, ["--score-size 128", "below --start-size 128"]),
        (TrainConfig, {"eval_size": "100000"}, ["--eval-size 100000", "at most"]),
        (TrainConfig, {"crop_scale": "1"}, ["--crop-scale 1", "2 numbers separated by commas"]),
        (TrainConfig, {"crop_scale": "0.5,0.1"}, ["--crop-scale 0.5,0.1", "0 < MIN <= MAX <= 1"]),
        (TrainConfig, {"crop_scale": "0,1"}, ["--crop-scale 0,1", "0 < MIN <= MAX <= 1"]),
        (TrainConfig, {"crop_scale": "0.1,2"}, ["--crop-scale 0.1,2", "0 < MIN <= MAX <= 1"]),
        (TrainConfig, {"crop_ratio": "2,1"}, ["--crop-ratio 2,1", "0 < MIN <= MAX"]),
        (TrainConfig, {"flip_prob": "1.5"}, ["--flip-prob 1.5", "between 0 and 1"]),
        (TrainConfig, {"jitter": "0.1,0.1"}, ["--jitter 0.1,0.1", "3 numbers separated by commas"]),
        (TrainConfig, {"jitter": "2,0,0"}, ["--jitter 2,0,0", "between 0 and 1"]),
        (TrainConfig, {"jitter": "-0.1,0,0"}, ["--jitter -0.1,0,0", "between 0 and 1"]),
        (TrainConfig, {"deterministic": "maybe"}, ["--deterministic maybe", "true or false"]),
        (EvaluateConfig, {"dtype": "auto"}, ["--dtype auto", "float32, tf32, bfloat16, float16"]),
        (EvaluateConfig, {"views": "0"}, ["--views 0", "at least 1"]),
        (EvaluateConfig, {"batch_size_per_process": "0"}, ["--batch-size-per-process 0", "at least 1"]),
        (EvaluateConfig, {"views_per_forward": "-1"}, ["--views-per-forward -1", "at least 0"]),
        (EvaluateConfig, {"max_images": "-1"}, ["--max-images -1", "at least 0"]),
        (EvaluateConfig, {"grid_per_class": "-1"}, ["--grid-per-class -1", "at least 0"]),
        (
            EvaluateConfig,
            {"grid_per_class": "5", "grid_images": "f"},
            ["--grid-per-class 5", "--grid-images", "remove one"],
        ),
        (EvaluateConfig, {"grid_per_class": "5", "grid": "false"}, ["--grid-per-class 5", "--no-grid", "remove one"]),
        (EvaluateConfig, {"grid_images": "f", "grid": "false"}, ["--grid-images f", "--no-grid", "remove one"]),
        (EvaluateConfig, {"image_size": "-1"}, ["--image-size -1", "at least 0"]),
        (EvaluateConfig, {"seed": "2147483648"}, ["--seed 2147483648", "2147483647"]),
        (EvaluateConfig, {"degrees": "500"}, ["--degrees 500", "180"]),
        (EvaluateConfig, {"translate_px": "300"}, ["--translate-px 300", "224"]),
        (ReproduceConfig, {"out": "o", "seeds": "0,x"}, ["--seeds", "x", "a whole number"]),
        (ReproduceConfig, {"out": "o", "seeds": ""}, ["--seeds", "at least one"]),
        (ReproduceConfig, {"out": "o", "rows": "fast:30"}, ["--rows fast:30", "nocrop, standard, random, worst10"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_bad_value_is_refused_naming_the_flag_the_value_and_what_is_allowed(kind, raw, parts):
    needed = {TrainConfig: TRAIN, EvaluateConfig: EVALUATE, ReproduceConfig: {"data": "d"}}[kind]
    with pytest.raises(UserError, match=r"^--") as caught:
        parse(kind, {**needed, **raw})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "raw", "message"),
    [
        (TrainConfig, {}, "missing required flags: --data, --mode, --out"),
        (TrainConfig, {"data": "d", "mode": "random"}, "missing required flag: --out"),
        (EvaluateConfig, {}, "missing required flags: --checkpoint, --data"),
        (EvaluateConfig, {"data": "d"}, "missing required flag: --checkpoint"),
        (ReproduceConfig, {"data": "d"}, "missing required flag: --out"),
    ],
)
def test_what_is_missing_is_named(kind, raw, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        parse(kind, raw)


@pytest.mark.parametrize(
    "config",
    [
        parse(TrainConfig, {**TRAIN, "milestones": "1,2", "jitter": "0,0,1", "translate_px": "12.5", "seed": "7"}),
        parse(TrainConfig, {**TRAIN, "milestones": "", "in_process": "true"}),
        parse(EvaluateConfig, {**EVALUATE, "grid": "false", "nnodes": "1:4", "rdzv_endpoint": "host:1"}),
        parse(ReproduceConfig, {"data": "d", "out": "o", "rows": "random:40,standard", "seeds": "0,1"}),
    ],
)
def test_a_configuration_survives_json(config):
    assert from_json(type(config), json.loads(json.dumps(to_json(config)))) == config


def test_what_json_holds_beyond_the_options_is_left_out():
    config = train_config()
    assert from_json(TrainConfig, {**to_json(config), "new_option": 3}) == config


def test_every_option_of_train_is_known_to_these_tests():
    # Its value alone would be refused: it is for the linear schedule.
    assert {f.name for f in dataclasses.fields(TrainConfig)} == {*ANOTHER_RUN, *SAME_RUN, "warmup_epochs"}


def test_a_warm_up_makes_another_run():
    one, other = (train_config(schedule="linear", warmup_epochs=epochs) for epochs in "12")
    assert identity(one) != identity(other)


@pytest.mark.parametrize(("name", "value"), ANOTHER_RUN.items())
def test_what_changes_the_numbers_makes_another_run(name, value):
    mine = identity(train_config())
    other = identity(dataclasses.replace(train_config(), **{name: value}))
    assert {n for n in mine if mine[n] != other[n]} == {name}


@pytest.mark.parametrize(("name", "value"), SAME_RUN.items())
def test_where_and_how_it_runs_leaves_a_run_the_same(name, value):
    needed: dict[str, dict[str, Any]] = {"max_cost": {"price": 2.0}, "plan_only": {"hours": 2.0}}
    other = dataclasses.replace(train_config(), **{name: value, **needed.get(name, {})})
    assert other != train_config()
    assert identity(other) == identity(train_config())


@pytest.mark.parametrize(("data", "epochs"), [("digits", 8), ("./digits", 110), ("imagenet", 110)])
def test_the_command_line_uses_the_preset_for_the_digits_alone(monkeypatch, data, epochs):
    from fast_spatial import commands

    asked = []
    monkeypatch.setattr(launcher, "launch", lambda task, config: asked.append(config))
    assert commands.main(["train", "--data", data, "--mode", "random", "--out", "o"]) == 0
    assert [config.epochs for config in asked] == [epochs]


@pytest.mark.parametrize(
    ("every", "steps", "seconds"), [("500", 500, 0), ("15min", 0, 900), ("0.5min", 0, 30), ("0", 0, 0)]
)
def test_checkpoints_come_by_steps_or_by_minutes(every, steps, seconds):
    config = train_config(checkpoint_every=every)
    assert (config.checkpoint_steps, config.checkpoint_sec) == (steps, seconds)
