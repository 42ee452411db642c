"""`--exclude FILE` leaves images out of training and evaluation, says so, and refuses what it does not understand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fast_spatial import launcher, preflight
from fast_spatial.config.commands import EvaluateConfig, ReproduceConfig
from fast_spatial.config.rows import requests
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.images import load_split
from fast_spatial.errors import UserError
from fast_spatial.evaluation.evaluate import evaluate_checkpoint
from fast_spatial.pipelines.dataset import LeftOut, read_exclusions, read_index
from fast_spatial.reproduce import requested_rows
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import World
from fast_spatial.training.train import train
from tests.config.test_cli import refused
from tests.project.test_preflight import ARCH, CLASSES, make_checkpoint, make_folder

TRAIN = (
    "train",
    "--data",
    "data",
    "--mode",
    "nocrop",
    "--out",
    "run",
    "--global-batch-size",
    "4",
    "--image-size",
    "32",
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """`data` with two images in each of three classes, in the current folder, without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "gpu_count", lambda: 0)
    make_folder(tmp_path / "data")
    yield
    distributed.stop()


def exclude(*lines: str) -> Path:
    listing = Path("exclude.txt")
    listing.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    return listing


def test_the_images_named_are_left_out_and_the_others_keep_their_labels():
    images = read_index(Path("data"), "train").without(
        exclude("# a comment", "", "train/bee/1.png", "train/ant/0.png", "val/ant/0.png", "train/bee/1.png")
    )
    paths = [images.relative_path(position) for position in range(len(images))]
    assert paths == ["train/ant/1.png", "train/bee/0.png", "train/cat/0.png", "train/cat/1.png"]
    assert images.labels.tolist() == [0, 1, 2, 2]
    assert images.classes == CLASSES
    assert images.left_out == LeftOut(("train/ant/0.png", "train/bee/1.png"), gone=0)
    assert images.describe_left_out() == ("train: 2 images excluded by --exclude: train/ant/0.png, train/bee/1.png")


def test_what_is_gone_from_the_disk_is_only_counted():
    listing = exclude("train/ant/0.png", "train/ant/gone.png", "train/gone/0.png")
    images = read_index(Path("data"), "train").without(listing)
    assert images.left_out == LeftOut(("train/ant/0.png",), gone=2)
    assert images.describe_left_out().endswith("train/ant/0.png; 2 more listed paths do not exist")


def test_a_split_that_the_list_does_not_name_stays_whole():
    images = read_index(Path("data"), "val").without(exclude("train/ant/0.png"))
    assert len(images) == 6
    assert images.describe_left_out() == ""


def test_odd_names_are_found_and_only_a_line_that_starts_with_it_is_a_comment():
    names = ["a #1.png", "ümläut.png", " space.png", "bytes \udcff.png"]
    for name in names:
        Path("data/train/ant", name).write_bytes(Path("data/train/ant/0.png").read_bytes())
    listing = exclude(*(f"train/ant/{name}\r" for name in names))
    images = read_index(Path("data"), "train").without(listing)
    assert len(images) == 6
    assert set(images.left_out.names) == {f"train/ant/{name}" for name in names}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["ant/0.png"],
            r"--exclude exclude.txt: ant/0.png is not in train/ or val/\nuse paths relative to the data folder",
        ),
        (["/data/train/ant/0.png"], "--exclude exclude.txt: /data/train/ant/0.png is not in train/ or val/"),
        (["train/ant/notes.txt"], "train/ant/notes.txt exists but is not an image of .*/data/train\nuse"),
        (["train/ant"], "train/ant exists but is not an image"),
        (["train/./ant/0.png"], "train/./ant/0.png exists but .*\nuse paths such as train/ant/0.png"),
        (["train/ant/0.png", "train/ant/1.png"], "class ant of .*train would have no images"),
    ],
)
def test_a_list_that_says_something_else_is_refused(lines, message):
    Path("data/train/ant/notes.txt").touch()
    with pytest.raises(UserError, match=message):
        read_index(Path("data"), "train").without(exclude(*lines))


def test_a_list_that_cannot_be_read_is_refused():
    for path in (Path("nowhere.txt"), Path("data")):
        with pytest.raises(
            UserError, match=rf"--exclude {path}: cannot read the file \(.*\)\ngive a file with one path"
        ):
            read_exclusions(path)


def test_a_pilot_run_counts_what_is_left():
    listing = exclude("train/ant/0.png")
    images = load_split("data", "train", exclude=str(listing), classes=2, max_images=3)
    assert len(images) == 3
    assert images.left_out.names == ("train/ant/0.png",)
    assert "train/ant/0.png" not in [images.relative_path(position) for position in range(3)]


@pytest.mark.parametrize("task", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "--exclude exclude.txt: cannot read the file (No such file or directory)"),
        (["n01440764/x.JPEG"], "--exclude exclude.txt: n01440764/x.JPEG is not in train/ or val/"),
        (["val/ant/0.png", "val/ant/1.png"], "--exclude exclude.txt: class ant of "),
    ],
)
def test_a_bad_list_is_refused_before_anything_starts(capsys, monkeypatch, task, lines, message):
    monkeypatch.setattr(launcher, "torchrun", lambda *_: pytest.fail("a process was started"))
    if lines is not None:
        exclude(*lines)
    judge = ("evaluate", "--data", "data", "--checkpoint", str(make_checkpoint(Path("model.pt"))))
    assert message in refused(capsys, *(TRAIN if task == "train" else judge), "--exclude", "exclude.txt")[0]
    assert not Path("run").exists()


def test_training_on_too_few_images_is_refused(capsys):
    exclude("train/ant/0.png", "train/bee/0.png", "train/cat/1.png")
    lines = refused(capsys, *TRAIN, "--exclude", "exclude.txt")
    assert lines[0] == "launch.py: --global-batch-size 4: data holds only 3 training images"


def test_training_says_what_was_left_out(capfd):
    exclude("train/ant/0.png", "train/cat/0.png", "val/bee/0.png")
    Path("data/train/ant/0.png").write_bytes(b"")  # would end it
    config = TrainConfig(
        data="data",
        mode="nocrop",
        out="run",
        epochs=1,
        milestones=(),
        global_batch_size=4,
        image_size=32,
        arch=ARCH,
        exclude="exclude.txt",
    )
    train(config, World(0, 0, 1, torch.device("cpu")))
    lines = capfd.readouterr().out.splitlines()
    assert lines[:2] == [
        "train: 2 images excluded by --exclude: train/ant/0.png, train/cat/0.png",
        "val: 1 images excluded by --exclude: val/bee/0.png",
    ]
    assert "4 training and 5 validation images" in lines[2]


@pytest.mark.parametrize(("lines", "images"), [(["val/bee/0.png"], 5), (["train/bee/0.png"], 6)])
def test_an_evaluation_that_leaves_images_out_is_partial(capfd, lines, images):
    exclude(*lines)
    config = EvaluateConfig(
        checkpoint=str(make_checkpoint(Path("model.pt"))),
        data="data",
        json="report.json",
        grid=False,
        views=1,
        exclude="exclude.txt",
    )
    evaluate_checkpoint(config, World(0, 0, 1, torch.device("cpu")))
    report = json.loads(Path("report.json").read_text())
    assert report["summary"]["num_images"] == len(report["images"]) == images
    assert report["summary"]["partial"] is (images < 6)
    assert ("val: 1 images excluded" in capfd.readouterr().out) is (images < 6)


def test_the_rows_of_a_table_are_trained_and_judged_without_what_is_excluded():
    config = ReproduceConfig(data="digits", out="table", rows=("random:30",))
    (row,) = requested_rows(requests(config, {"exclude": "exclude.txt"}))
    assert row.train.exclude == row.evaluate.exclude == "exclude.txt"
