"""What cannot work is refused before a process is started or a file written, in words that say what to do."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fast_spatial import commands, launcher, preflight, reproduce
from fast_spatial.config.commands import EvaluateConfig, ReproduceConfig
from fast_spatial.config.fields import from_json, parse, to_json
from fast_spatial.config.recipes import train_config
from fast_spatial.config.rows import requests
from fast_spatial.config.train import TrainConfig
from fast_spatial.evaluation.inputs import load_model_and_images
from fast_spatial.models import checkpoint, classifier
from fast_spatial.pipelines.dataset import check_classes_agree
from fast_spatial.runtime.files import write_json
from tests.config.test_cli import refused

ARCH = "shufflenet_v2_x0_5"  # the smallest
CLASSES = ("ant", "bee", "cat")
TRAIN = (
    "train",
    "--data",
    "data",
    "--mode",
    "random",
    "--out",
    "run",
    "--global-batch-size",
    "4",
    "--image-size",
    "32",
)


def make_folder(
    root: Path, *, train: tuple[str, ...] = CLASSES, val: tuple[str, ...] = CLASSES, images: int = 2
) -> Path:
    """A data folder with so many tiny images in every class."""
    for split, classes in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                Image.new("RGB", (8, 8), (9 * number, 0, 0)).save(root / split / name / f"{number}.png")
    return root


def make_checkpoint(path: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """A checkpoint as training writes it, of an untrained model."""
    config = TrainConfig(data="data", out="run", mode="random", arch=ARCH, image_size=32)
    net = classifier.build(ARCH, len(classes))
    content = {"format": checkpoint.FORMAT, "model": net.state_dict(), "arch": ARCH, "classes": list(classes)}
    torch.save({**content, "config": to_json(config)}, path)
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "ours.pt")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "plain.pt"
    torch.save(classifier.build(ARCH, len(CLASSES)).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def cpu_machine(tmp_path, monkeypatch):
    """Run in an empty folder, on a machine without a GPU, where starting a process fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(preflight, "gpu_count", lambda: 0)
    monkeypatch.setattr(launcher, "torchrun", lambda *_: pytest.fail("a process was started"))


@pytest.fixture
def data():
    return make_folder(Path("data"))


@pytest.fixture
def started(monkeypatch):
    """What torchrun is asked to start: (number of processes, task, configuration)."""
    calls = []

    def torchrun(config, job, processes, words):
        assert job.startswith(f"{config.rdzv_id}-")
        task, text, limit = words
        assert limit == "null"
        assert from_json(type(config), json.loads(text)) == config
        calls.append((processes, task, config))

    monkeypatch.setattr(launcher, "torchrun", torchrun)
    return calls


@pytest.fixture
def refuse(capsys):
    """A function from a command line to the two lines in which it is refused, with nothing changed on disk."""

    def files() -> Iterator[tuple[str, float]]:
        yield from sorted((str(path), path.stat().st_mtime_ns) for path in Path().rglob("*"))

    def run(*words: str) -> list[str]:
        before = list(files())
        lines = refused(capsys, *words)
        assert list(files()) == before
        return lines

    return run


# --- the folder of images


def test_a_good_training_is_started_with_its_configuration(data, started):
    assert commands.main([*TRAIN, "--nproc-per-node", "2", "--seed", "3"]) == 0
    ((processes, task, config),) = started
    assert (processes, task, config.seed, config.data) == (2, "train", 3, "data")
    assert json.loads(Path("run/config.json").read_text()) == to_json(config)


def test_a_folder_named_by_digits_is_a_folder(started):
    make_folder(Path("2012"))
    assert commands.main(["train", "--data", "2012", *TRAIN[3:]]) == 0
    assert started[0][2].data == "2012"


def test_a_missing_folder(refuse):
    lines = refuse("train", "--data", "2012", *TRAIN[3:])
    assert lines == [
        "launch.py: --data 2012: no such folder",
        "give the folder that contains train/ and val/, or digits",
    ]


def test_an_empty_folder(refuse):
    Path("data").mkdir()
    lines = refuse(*TRAIN)
    assert lines == [
        "launch.py: --data data: no folder train/ in it (found: nothing)",
        "expected data/train/<class>/<image>",
    ]


def test_a_folder_without_val(refuse):
    make_folder(Path("data"), val=())
    lines = refuse(*TRAIN)
    assert lines == ["launch.py: --data data: no folder val/ in it (found: train)", "expected data/val/<class>/<image>"]


def test_an_empty_split(refuse):
    make_folder(Path("data"), val=())
    Path("data/val").mkdir()
    assert refuse(*TRAIN) == ["launch.py: --data data: data/val is empty", "expected data/val/<class>/<image>"]


def test_classes_that_differ(refuse):
    make_folder(Path("data"), train=("ant", "bee"), val=("bee", "cat"))
    line = refuse(*TRAIN)[0]
    assert "--data data: train/ and val/ have different classes (only in train: ant; only in val: cat)" in line


def test_many_classes_that_differ_are_not_all_listed(refuse):
    make_folder(Path("data"), train=tuple("abcdefg"), val=("a",))
    assert "(only in train: b, c, d and 3 more; only in val: none)" in refuse(*TRAIN)[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_images(refuse, data, split):
    for image in (data / split / "bee").iterdir():
        image.rename(image.with_suffix(".txt"))
    assert refuse(*TRAIN) == [
        f"launch.py: --data data: class folder data/{split}/bee contains no images",
        "add images, or remove the folder",
    ]


def make_flat_val() -> None:
    make_folder(Path("data"), val=())
    Path("data/val").mkdir()
    for number in range(1, 7):
        Image.new("RGB", (8, 8)).save(f"data/val/ILSVRC2012_val_{number:08d}.JPEG")


def test_a_flat_val_is_refused_with_the_line_that_sorts_it(refuse):
    make_flat_val()
    message, fix = refuse(*TRAIN)
    assert "--data data: data/val contains 6 images but no class folders" in message
    assert shlex.split(fix)[:2] == ["python", "-c"]
    assert str(Path("data").resolve()) in fix


def test_the_line_that_sorts_a_flat_val_does_so(refuse, monkeypatch):
    from torchvision.datasets import imagenet

    make_flat_val()
    code = shlex.split(refuse(*TRAIN)[1])[2]
    monkeypatch.setattr(imagenet, "parse_devkit_archive", lambda root: None)  # it takes the real archive alone
    monkeypatch.setattr(imagenet, "load_meta_file", lambda root: ({}, ["cat", "ant", "ant", "bee", "cat", "bee"]))
    exec(code, {})
    assert check_classes_agree(Path("data")) == list(CLASSES)
    found = {path.parent.name: path.name for path in sorted(Path("data/val").rglob("*_0000000[125].JPEG"))}
    assert found == {"ant": "ILSVRC2012_val_00000002.JPEG", "cat": "ILSVRC2012_val_00000005.JPEG"}


def test_more_classes_asked_for_than_there_are(refuse, data):
    assert "--max-classes 5: data has 3 classes" in refuse(*TRAIN, "--max-classes", "5")[0]


@pytest.mark.parametrize(("images", "words"), [(1, []), (1, ["--max-classes", "2"])])
def test_fewer_training_images_than_one_batch(refuse, images, words):
    make_folder(Path("data"), images=images)
    assert "--global-batch-size" in refuse(*TRAIN, *words)[0]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--max-classes", "20"], "--max-classes 20: digits has 10 classes"),
        (["--global-batch-size", "2000"], "--global-batch-size 2000"),
    ],
)
def test_the_digits_are_checked_like_a_folder(refuse, words, part):
    assert part in refuse("train", "--data", "digits", "--mode", "random", "--out", "run", *words)[0]


# --- the folder of the run


def test_the_same_run_is_continued_whatever_the_logging_and_the_processes(data, started):
    assert commands.main([*TRAIN]) == 0
    assert commands.main([*TRAIN, "--eval-every", "5", "--log-every", "1", "--nproc-per-node", "2"]) == 0
    assert [processes for processes, _, _ in started] == [1, 2]


def test_another_run_in_the_folder_is_refused_listing_what_differs(refuse, data, started):
    assert commands.main([*TRAIN]) == 0
    lines = refuse(*TRAIN, "--lr", "0.2", "--milestones", "3,5", "--eval-every", "5")
    listed = "milestones: [30, 60, 85, 95, 105] saved, [3, 5] given; lr: 0.1 saved, 0.2 given"
    assert lines == [
        f"launch.py: --out run: contains a run with different settings ({listed})",
        "choose another folder",
    ]
    assert len(started) == 1


def test_a_run_is_continued_only_if_that_is_wanted(refuse, data, started):
    assert commands.main([*TRAIN, "--resume", "never"]) == 0
    assert commands.main([*TRAIN, "--resume", "never"]) == 0  # as on a second node
    Path("run/log.jsonl").write_text("")
    lines = refuse(*TRAIN, "--resume", "never")
    assert lines == ["launch.py: --out run: contains a run, and --resume never is set", "name a new folder"]
    assert len(started) == 2


def test_a_folder_with_other_files_is_refused(refuse, data):
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("mine")
    assert "--out run: contains files, but no run of this program" in refuse(*TRAIN)[0]


@pytest.mark.parametrize("content", ["not json", "[]", "null"])
def test_a_folder_with_a_foreign_config_is_refused(refuse, data, content):
    Path("run").mkdir()
    Path("run/config.json").write_text(content)
    assert "--out run: contains files, but no run of this program" in refuse(*TRAIN)[0]


def test_an_empty_folder_is_taken(data, started):
    Path("run").mkdir()
    assert commands.main([*TRAIN]) == 0
    assert len(started) == 1


def test_a_run_that_is_a_file_is_refused(refuse, data):
    Path("run").write_text("mine")
    assert "--out run: this path is a file" in refuse(*TRAIN)[0]


def test_a_run_below_a_file_is_refused(refuse, data):
    Path("file").write_text("mine")
    assert "--out file/run" in refuse(*TRAIN[:5], "--out", "file/run", *TRAIN[7:])[0]


def test_another_node_writes_nothing(data, started):
    words = ["--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "host:29400"]
    assert commands.main([*TRAIN, *words]) == 0
    assert not Path("run").exists()


@pytest.mark.parametrize("recipe", ["fast", "e24"])
def test_the_advice_on_a_replay_is_what_has_to_be_typed(refuse, data, started, recipe):
    """A budget chooses the recipe and its epochs; e24 is what older plans called this one."""
    replay = [*TRAIN, "--start-size", "0", "--replay", "planned"]
    sizes = {"global_batch_size": "4", "image_size": "32", "start_size": "0"}
    config = train_config({"data": "data", "mode": "random", "out": "o", "recipe": "fast", "epochs": "24", **sizes})
    write_json(Path("planned/config.json"), {**to_json(config), "recipe": recipe})
    segment = {"event": "segment", "start": 0, "progress": 0.0, "end": 6}
    Path("planned/log.jsonl").write_text(json.dumps(segment) + "\n")
    reason, advice = refuse(*replay, "--recipe", "fast")
    assert "epochs: 24 saved, 16 given" in reason
    assert advice == "repeat its flags, with --recipe fast --epochs 24"
    assert commands.main([*replay, *advice.split("with ")[1].split()]) == 0


# --- processes and batches


def test_a_batch_that_does_not_divide_names_the_nearest_that_do(refuse, data):
    lines = refuse(*TRAIN, "--nproc-per-node", "3")
    assert lines == [
        "launch.py: --global-batch-size 4: not divisible by 3 processes",
        "use 2 processes, or --global-batch-size 6",
    ]


def test_a_batch_divides_among_the_processes_of_all_nodes(refuse, data):
    lines = refuse(*TRAIN, "--nproc-per-node", "2", "--nnodes", "3", "--rdzv-endpoint", "host:29400")
    assert lines == [
        "launch.py: --global-batch-size 4: not divisible by 6 processes",
        "use 4 processes, or --global-batch-size 6",
    ]


def test_by_default_there_is_a_process_per_gpu(refuse, data, started, monkeypatch):
    monkeypatch.setattr(preflight, "gpu_count", lambda: 2)
    assert commands.main([*TRAIN]) == 0
    assert started[0][0] == 2
    assert "exceeds the 2 GPUs of this node" in refuse(*TRAIN, "--nproc-per-node", "4")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nnodes", "2"], "--nnodes 2: several nodes require --rdzv-endpoint HOST:PORT"),
        (["--nnodes", "1:2"], "--nnodes 1:2: several nodes require --rdzv-endpoint HOST:PORT"),
        (["--nnodes", "two"], "--nnodes two: expected a number, or MIN:MAX"),
        (["--nnodes", "0"], "--nnodes 0: expected a number, or MIN:MAX"),
        (["--nnodes", "1:x", "--rdzv-endpoint", "h:1"], "--nnodes 1:x: expected a number, or MIN:MAX"),
        (["--nnodes", "2:1", "--rdzv-endpoint", "h:1"], "--nnodes 2:1: expected a number, or MIN:MAX"),
        (["--rdzv-endpoint", "h:port"], "--rdzv-endpoint h:port: expected HOST:PORT"),
        (["--rdzv-endpoint", "h", "--rdzv-backend", "static"], "--rdzv-endpoint h: expected HOST:PORT"),
        (["--rdzv-endpoint", "h:1", "--rdzv-backend", "c11d"], "--rdzv-backend c11d: choose one of c10d, etcd, "),
        (["--stall-minutes", "0"], "--stall-minutes 0: must be more than 0"),
        (["--in-process", "--nproc-per-node", "2"], "--in-process conflicts with several processes"),
        (["--grad-accum-steps", "5"], "--grad-accum-steps 5: exceeds the local batch of 4 images"),
        (
            ["--grad-accum-steps", "3", "--nproc-per-node", "2"],
            "--grad-accum-steps 3: exceeds the local batch of 2 images",
        ),
        (
            ["--bn-group-size", "3"],
            "--bn-group-size 3: must divide the local batch of 4 images",
        ),
        (["--bn-group-size", "8"], "--bn-group-size 8: must divide the local batch of 4 images"),
        (
            ["--bn-group-size", "4", "--grad-accum-steps", "2"],
            "--bn-group-size 4: must divide the local batch of 4 images, split into 2 parts",
        ),
        (["--max-train-images", "3"], "--max-train-images 3: less than one"),
        (["--dtype", "float16"], "--dtype float16: requires a GPU, and none is visible"),
        (["--arch", "resnet19"], "--arch resnet19: torchvision has no such model; choose one of "),
        (["--arch", "googlenet"], "--arch googlenet: its forward pass returns several tensors in training; choose one"),
    ],
)
def test_what_cannot_work_is_refused(refuse, data, words, message):
    assert message in refuse(*TRAIN, *words)[0]


@pytest.mark.parametrize("arch", ["regnet_x_400mf", "mobilenet_v3_small", "squeezenet1_1"])
def test_other_architectures_are_taken(data, started, arch):
    assert commands.main([*TRAIN, "--arch", arch]) == 0
    assert started[0][2].arch == arch


@pytest.mark.parametrize("arch", ["vit_b_16", "alexnet"])
def test_an_architecture_that_cannot_take_views_of_the_side_is_refused(refuse, data, arch):
    line = refuse(*TRAIN, "--arch", arch)[0]
    assert f"--arch {arch}" in line and "--image-size 32" in line


def test_batches_that_do_work_are_taken(data, started):
    assert commands.main([*TRAIN, "--bn-group-size", "2", "--grad-accum-steps", "2", "--max-train-images", "4"]) == 0
    assert len(started) == 1


# --- apex


def test_apex_that_is_missing(refuse, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", None)
    lines = refuse(*TRAIN, "--optimizer", "apex")
    assert "--optimizer apex: NVIDIA's apex with its CUDA kernels is not installed" in lines[0]
    assert "--optimizer sgd" in lines[1]


def test_an_impostor_named_apex_is_not_taken_for_nvidias(refuse, data, monkeypatch):
    impostor, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.__dict__["FusedSGD"] = torch.optim.SGD
    monkeypatch.setitem(sys.modules, "apex", impostor)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    assert "`pip install apex` installs an unrelated package" in refuse(*TRAIN, "--optimizer", "apex")[0]


def test_an_apex_without_fused_sgd_is_not_taken(refuse, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.ModuleType("apex.optimizers"))
    assert "--optimizer apex: NVIDIA's apex" in refuse(*TRAIN, "--optimizer", "apex")[0]


def test_nvidias_apex_needs_a_gpu(refuse, data, monkeypatch):
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.__dict__["FusedSGD"] = torch.optim.SGD
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    assert "needs a GPU, and none is visible" in refuse(*TRAIN, "--optimizer", "apex")[0]


# --- evaluation


def evaluation(path: Path, **raw: str) -> EvaluateConfig:
    return parse(EvaluateConfig, {"checkpoint": str(path), "data": "data", **raw})


def test_a_good_evaluation_is_started(data, ours, started):
    assert commands.main(["evaluate", "--checkpoint", str(ours), "--data", "data"]) == 0
    assert [task for _, task, _ in started] == ["evaluate"]


def test_what_is_judged(data, ours, plain):
    classifier, images, on_grid, side = load_model_and_images(evaluation(ours))
    assert (len(images), images.labels.tolist(), on_grid, side) == (6, [0, 0, 1, 1, 2, 2], {*range(6)}, 32)
    assert not classifier.training
    assert load_model_and_images(evaluation(ours, image_size="64"))[3] == 64
    assert load_model_and_images(evaluation(plain, arch=ARCH))[3] == 224
    assert len(load_model_and_images(evaluation(ours, max_images="4"))[1]) == 4


def test_a_checkpoint_that_is_missing(refuse, data):
    line = refuse("evaluate", "--checkpoint", "gone.pt", "--data", "data")[0]
    assert "--checkpoint gone.pt: file not found" in line


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x80\x02garbage"])
def test_a_file_that_is_no_checkpoint_is_refused_saying_what_is_expected(refuse, data, name, content):
    Path(name).write_bytes(content)
    lines = refuse("evaluate", "--checkpoint", name, "--data", "data")
    assert f"--checkpoint {name}: " in lines[0]
    assert "use a .safetensors file, or a torch.save file that holds only tensors and plain values" in lines[1]


def test_a_checkpoint_of_something_else(refuse, data):
    torch.save({"weight": "none", "epoch": 3}, "file.pt")
    line = refuse("evaluate", "--checkpoint", "file.pt", "--data", "data")[0]
    assert "--checkpoint file.pt: no classifier weights found (keys: weight, epoch)" in line


def test_a_checkpoint_of_another_architecture(refuse, data, ours, plain):
    lines = refuse("evaluate", "--checkpoint", str(ours), "--data", "data", "--arch", "resnet18")
    assert f"--checkpoint {ours}: contains a {ARCH}, but --arch is resnet18" in lines[0]
    assert lines[1] == "remove --arch"
    lines = refuse("evaluate", "--checkpoint", str(plain), "--data", "data")
    assert f"--checkpoint {plain}: the weights do not match resnet18 with 3 classes" in lines[0]
    assert lines[1].startswith("120 missing: conv1.weight, bn1.weight, bn1.bias and 117 more; 336 unexpected: conv1.0.")
    assert lines[1].endswith(
        "; 1 of another shape: fc.weight [3, 1024] instead of [3, 512]; set --arch to its architecture"
    )


def test_a_checkpoint_with_weights_that_are_not_numbers(refuse, data):
    state = classifier.build(ARCH, 3).state_dict()
    state["fc.bias"][1] = float("nan")
    torch.save(state, "file.pt")
    line = refuse("evaluate", "--checkpoint", "file.pt", "--data", "data", "--arch", ARCH)[0]
    assert "--checkpoint file.pt: some weights are NaN or inf" in line


def test_fewer_classes_than_the_model_has_outputs_must_be_asked_for(refuse, plain):
    make_folder(Path("data"), val=("ant", "bee"))
    lines = refuse("evaluate", "--checkpoint", str(plain), "--data", "data", "--arch", ARCH)
    assert "--data data: has 2 classes, and the model 3 outputs" in lines[0]
    assert "--allow-partial-classes" in lines[1]
    images = load_model_and_images(evaluation(plain, arch=ARCH, allow_partial_classes="true"))[1]
    assert images.labels.tolist() == [0, 0, 1, 1]


def test_more_classes_than_the_model_has_outputs_are_refused_and_no_flag_is_offered(refuse, plain):
    make_folder(Path("data"), val=(*CLASSES, "dog"))
    words = ["evaluate", "--checkpoint", str(plain), "--data", "data", "--arch", ARCH]
    for more in ([], ["--allow-partial-classes"]):
        lines = refuse(*words, *more)
        assert "--data data: has 4 classes" in lines[0]
        assert "--allow-partial-classes" not in lines[1]


def test_a_folder_with_some_of_our_classes_is_labelled_by_their_names(refuse, ours):
    make_folder(Path("data"), val=("bee", "cat"))
    lines = refuse("evaluate", "--checkpoint", str(ours), "--data", "data")
    assert "--data data: has 2 of the 3 classes" in lines[0]
    assert lines[1] == "to evaluate only these classes, add --allow-partial-classes"
    images = load_model_and_images(evaluation(ours, allow_partial_classes="true"))[1]
    assert images.labels.tolist() == [1, 1, 2, 2]


def test_a_class_that_our_checkpoint_was_not_trained_on_is_named(refuse, ours):
    make_folder(Path("data"), val=("ant", "bee", "cow"))
    line = refuse("evaluate", "--checkpoint", str(ours), "--data", "data", "--allow-partial-classes")[0]
    assert "--data data: class cow is not among the 3 classes" in line


def test_a_pilot_run_on_the_first_classes_is_judged_on_these(data, started):
    config = parse(ReproduceConfig, {"data": "data", "out": "runs", "rows": "standard"})
    (row,) = reproduce.requested_rows(requests(config, {"max_classes": "2", "global_batch_size": "4"}))
    Path(row.train.out).mkdir(parents=True)
    make_checkpoint(Path(row.evaluate.checkpoint), CLASSES[:2])
    assert load_model_and_images(row.evaluate)[1].labels.tolist() == [0, 0, 1, 1]


def test_paths_that_meet_the_grid(refuse, data, ours):
    Path("list.txt").write_text("val/bee/0.png\n\nval/cat/1.png\n")
    assert load_model_and_images(evaluation(ours, grid_images="list.txt"))[2] == {2, 5}
    Path("list.txt").write_text("val/bee/0.png\nval/bee/7.png\n")
    words = ["evaluate", "--checkpoint", str(ours), "--data", "data", "--grid-images"]
    line = refuse(*words, "list.txt")[0]
    assert "--grid-images list.txt: val/bee/7.png is not among the images; paths look like val/ant/0.png" in line
    assert "--grid-images gone.txt: no such file" in refuse(*words, "gone.txt")[0]
    Path("latin.txt").write_bytes(b"val/\xe9.png\n")
    assert "--grid-images latin.txt: cannot read the file ('utf-8' codec" in refuse(*words, "latin.txt")[0]


def test_how_many_images_of_each_class_meet_the_grid(refuse, data, ours):
    one = load_model_and_images(evaluation(ours, grid_per_class="1"))[2]
    assert one is not None and sorted(position // 2 for position in one) == [0, 1, 2]
    assert load_model_and_images(evaluation(ours, grid_per_class="2"))[2] == set(range(6))
    words = ["evaluate", "--checkpoint", str(ours), "--data", "data", "--grid-per-class", "3"]
    what, advice = refuse(*words)
    assert "--grid-per-class 3: " in what and what.endswith("data/val holds only 2 images of class ant")
    assert advice == "lower --grid-per-class"


@pytest.mark.parametrize(("target", "part"), [("folder", "that is a folder"), ("file/x.json", "")])
def test_a_json_that_cannot_be_written_is_refused_before_judging(refuse, data, ours, target, part):
    Path("folder").mkdir()
    Path("file").write_text("mine")
    line = refuse("evaluate", "--checkpoint", str(ours), "--data", "data", "--json", target)[0]
    assert f"--json {target}: {part}" in line


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: None, "--data data: no such folder"),
        (lambda: Path("data").mkdir(), "--data data: no folder val/ in it"),
        (make_flat_val, "--data data: data/val contains 6 images but no class folders"),
    ],
)
def test_an_evaluation_checks_the_folder_too(refuse, ours, make, part):
    make()
    assert part in refuse("evaluate", "--checkpoint", str(ours), "--data", "data")[0]


def test_an_evaluation_needs_val_alone(ours):
    make_folder(Path("data"), train=())
    assert np.bincount(load_model_and_images(evaluation(ours))[1].labels).tolist() == [2, 2, 2]


# --- the reproduction


def test_every_row_is_checked_before_the_first_is_trained(refuse, data):
    folder = Path("runs/random_30/seed_0")
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    words = ["reproduce", "--data", "data", "--out", "runs", "--rows", "standard,random:30", "--global-batch-size", "4"]
    assert f"--out {folder}: contains files" in refuse(*words)[0]


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--global-batch-size", "1"], "--global-batch-size 1"),
        (["--global-batch-size", "4", "--grad-accum-steps", "4"], "--grad-accum-steps 4"),
        (["--global-batch-size", "4", "--bn-group-size", "1"], "--bn-group-size 1"),
    ],
)
def test_a_batch_of_which_batch_norm_would_see_one_value_is_refused(refuse, words, flag):
    first, second = refuse("train", "--data", "digits", "--mode", "standard", "--out", "run", *words)
    assert first.startswith(f"launch.py: {flag}: BatchNorm") and "--image-size 32" in first
    assert "--global-batch-size" in second


def test_a_batch_of_one_image_of_many_pixels_is_taken(data, started):
    words = [*TRAIN[: TRAIN.index("--global-batch-size")], "--global-batch-size", "1"]
    assert commands.main([*words, "--image-size", "64"]) == 0
    assert len(started) == 1


@pytest.mark.parametrize("command", [["report", "OUT"], ["reproduce", "--data", "digits", "--out", "OUT"]])
def test_a_missing_package_of_the_report_is_named_before_anything_starts(tmp_path, monkeypatch, capsys, command):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else find_spec(name))
    out = tmp_path / "out"
    assert commands.main([word.replace("OUT", str(out)) for word in command]) == 2
    said = capsys.readouterr().err
    assert "not installed: jinja2" in said and "pip install jinja2" in said
    assert not out.exists()
