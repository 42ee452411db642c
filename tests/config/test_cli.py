"""The command line refuses what it does not understand, in two lines and before anything happens."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fast_spatial import commands, launcher, preflight
from fast_spatial.config.cli import read_flags
from fast_spatial.config.commands import (
    BenchConfig,
    CheckConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    LandscapeConfig,
    RecipesConfig,
    ReportConfig,
    ReproduceConfig,
)
from fast_spatial.config.fields import RENAMED, SECTIONS, convert, decides_numbers, flag
from fast_spatial.config.train import TrainConfig
from fast_spatial.reporting import report

ROOT = Path(__file__).parents[2]
TRAIN = ("train", "--data", "d", "--mode", "random", "--out", "o")
EVALUATE = ("evaluate", "--checkpoint", "c.pt", "--data", "d")

# Every option and its default. A difference here is a change of the interface: make it on purpose, and say so.
LAUNCH_OPTIONS = {
    "nproc_per_node": 0,
    "nnodes": "1",
    "node_rank": 0,
    "rdzv_backend": "c10d",
    "rdzv_endpoint": "",
    "rdzv_id": "fast_spatial",
    "max_restarts": 0,
    "in_process": False,
    "stall_minutes": 20.0,
    "workers": 0,
    "decode": "auto",
    "warp": "auto",
}
TRAIN_OPTIONS = {
    "data": "",
    "out": "",
    "mode": "",
    "recipe": "",
    "hours": None,
    "gpu_hours": None,
    "max_cost": None,
    "price": 0.0,
    "until": "",
    "plan_only": False,
    "replay": "",
    "degrees": 30.0,
    "translate_px": None,
    "views": 10,
    "epochs": 110,
    "global_batch_size": 256,
    "lr": 0.1,
    "schedule": "milestones",
    "milestones": (30, 60, 85, 95, 105),
    "gamma": 0.1,
    "warmup_epochs": 0.0,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "bn_weight_decay": True,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "optimizer": "sgd",
    "arch": "resnet18",
    "blurpool": False,
    "image_size": 224,
    "start_size": 0,
    "eval_size": 0,
    "eval_flip": False,
    "crop_scale": (0.08, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "flip_prob": 0.5,
    "jitter": (0.1, 0.1, 0.1),
    "lighting": 0.05,
    "bn_group_size": 0,
    "dtype": "auto",
    "grad_accum_steps": 1,
    "views_per_forward": 0,
    "score_size": 0,
    "compile": "auto",
    "seed": 0,
    "max_classes": 0,
    "max_train_images": 0,
    "exclude": "",
    "deterministic": False,
    "resume": "auto",
    "checkpoint_every": "15min",
    "on_bad_image": "stop",
    "max_bad_images": 50,
    "eval_every": 1,
    "log_every": 20,
    "profile": 0,
    **LAUNCH_OPTIONS,
}
EVALUATE_OPTIONS = {
    "checkpoint": "",
    "data": "",
    "json": "",
    "degrees": 30.0,
    "translate_px": None,
    "views": 10,
    "grid": True,
    "image_size": 0,
    "flip": False,
    "arch": "",
    "dtype": "float32",
    "seed": 0,
    "exclude": "",
    "max_images": 0,
    "grid_images": "",
    "grid_per_class": 0,
    "allow_partial_classes": False,
    "batch_size_per_process": 128,
    "views_per_forward": 0,
    **LAUNCH_OPTIONS,
}
LANDSCAPE_OPTIONS = {
    "checkpoint": "",
    "data": "",
    "out": "",
    "images_per_class": 0,
    "degrees": 30.0,
    "translate_px": None,
    "image_size": 0,
    "arch": "",
    "dtype": "float32",
    "exclude": "",
    "allow_partial_classes": False,
    "views_per_forward": 0,
    **LAUNCH_OPTIONS,
}
REPORT_OPTIONS = {"runs": (), "out": "", "price": 0.0}
EXPORT_OPTIONS = {"checkpoint": "", "safetensors": "", "onnx": "", "image_size": 0, "arch": ""}
CHECK_OPTIONS = {"data": "", "splits": ("train", "val"), "json": "", "write_exclusions": "", "workers": 0}
BENCH_OPTIONS = {
    "what": "all",
    "data": "synthetic",
    "json": "",
    "checkpoint": "",
    "rounds": 7,
    "seconds": 1.0,
    "image_size": 224,
    "grid_images": 16,
    "workers": 0,
    "read_latency_ms": 0.0,
    "ffcv_python": "",
}
DOCTOR_OPTIONS = {"data": "", "out": "", "json": ""}
KINDS: dict[str, tuple[type, ...]] = {
    "train": (TrainConfig,),
    "evaluate": (EvaluateConfig,),
    "reproduce": (TrainConfig, ReproduceConfig),
    "landscape": (LandscapeConfig,),
    "report": (ReportConfig,),
    "export": (ExportConfig,),
    "check-data": (CheckConfig,),
    "recipes": (RecipesConfig,),
    "bench": (BenchConfig,),
    "doctor": (DoctorConfig,),
}
REPRODUCE_DECIDES = {"mode", "degrees", "translate_px", "seed", "replay"}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The two lines in which a command line is refused."""
    capsys.readouterr()
    status = commands.main(list(words))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert status == 2
    assert captured.out == ""
    assert len(lines) == 2 and lines[0].startswith("launch.py: "), captured.err
    return lines


@pytest.fixture(autouse=True)
def nothing_happens(tmp_path, monkeypatch):
    """The current folder is empty and stays so, and no process is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "torchrun", lambda *_: pytest.fail("a process was started"))
    monkeypatch.setattr(launcher, "launch", lambda *_: pytest.fail("the command was called"))
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def configured(monkeypatch):
    """A function from a command line to the configuration it asks for."""

    def run(*words):
        asked = []
        monkeypatch.setattr(launcher, "launch", lambda task, config: asked.append((task, config)))
        assert commands.main(list(words)) == 0
        ((task, config),) = asked
        assert task == words[0]
        return config

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "trian: unknown command; did you mean train?; choose one of "),
        (["evalute", "--data", "d"], "evalute: unknown command; did you mean evaluate?"),
        (["--train"], "--train: unknown command; did you mean train?"),
        ([""], "unknown command; choose one of train, evaluate, reproduce"),
        (["train", "--epoch", "3"], "--epoch: unknown flag; did you mean --epochs?"),
        (["train", "--hlep"], "--hlep: unknown flag; did you mean --help?"),
        ([*TRAIN, "--epoch", "3"], "--epoch: unknown flag; did you mean --epochs?"),
        ([*TRAIN, "--global_batch", "3"], "--global-batch: unknown flag; did you mean --global-batch-size?"),
        ([*TRAIN, "--checkpoint", "c.pt"], "--checkpoint: unknown flag"),
        ([*EVALUATE, "--epochs", "3"], "--epochs: unknown flag"),
        (["export", "--checkpoint", "c.pt"], "missing required flag: --safetensors or --onnx"),
        (["export", "--onnx", "m.onnx"], "missing required flag: --checkpoint"),
        (["export", "--checkpoint", "c.pt", "--onnx", "m"], "--onnx m: the name must end in .onnx"),
        (
            ["export", "--checkpoint", "c.pt", "--onnx", "m.onnx", "--image-size", "-1"],
            "--image-size -1: must be at least 0",
        ),
        (["reproduce", "--data", "d", "--out", "o", "--degrees", "40"], "--degrees: unknown flag"),
        (["landscape", "--data", "d", "--out", "o"], "missing required flag: --checkpoint"),
        (["report"], "missing required flag: --runs"),
        (["report", "a", "b"], "missing required flag: --out"),
        (["report", "--out", "o", "a"], "a: unexpected word"),
        (["report", "a", "--price", "-1"], "--price -1: must be at least 0"),
        ([*TRAIN, "--epochs", "1e5"], "--epochs 1e5: expected a whole number"),
        ([*TRAIN, "--epochs=3.0"], "--epochs 3.0: expected a whole number"),
        ([*TRAIN, "--seed"], "--seed: missing value"),
        ([*TRAIN, "--seed", "--epochs", "3"], "--seed: missing value"),
        (["train", "--data", "--mode", "random"], "--data: missing value"),
        ([*TRAIN, "-r", "x"], "-r: one-letter flags do not exist"),
        ([*TRAIN, "-e=3"], "-e=3: one-letter flags do not exist"),
        ([*TRAIN, "-m"], "-m: one-letter flags do not exist"),
        ([*TRAIN, "--nodata"], "--nodata: unknown flag"),
        ([*TRAIN, "--no-epochs"], "--no-epochs: unknown flag"),
        ([*TRAIN, "stray"], "stray: unexpected word; every value needs its flag"),
        (["train", "digits", "--mode", "random", "--out", "o"], "digits: unexpected word"),
        ([*TRAIN, "-5"], "-5: unexpected word"),
        ([*TRAIN, "-"], "-: unexpected word"),
        ([*TRAIN, "--", "--verbose"], "--: unexpected word"),
        ([*TRAIN, "--deterministic", "yes"], "yes: unexpected word"),
        ([*TRAIN, "--interactive"], "--interactive: unknown flag"),
        ([*TRAIN, "--seed", "1", "--seed", "2"], "--seed: given twice"),
        ([*TRAIN, "--bn-group-size", "1", "--bn_group_size=2"], "--bn-group-size: given twice"),
        ([*TRAIN, "--deterministic", "--nodeterministic"], "--deterministic: given twice"),
        ([*TRAIN, "--nodeterministic=true"], "--nodeterministic takes no value"),
        ([*TRAIN, "--deterministic=1"], "--deterministic 1: expected true or false"),
        ([*TRAIN, "--lr", "-0.5"], "--lr -0.5: must be at least 0"),
        ([*TRAIN, "--lr=-inf"], "--lr -inf: expected a finite number"),
        (["train"], "missing required flags: --data, --mode, --out"),
        (["train", "--data=", "--mode", "random", "--out", "o"], "missing required flag: --data"),
    ],
)
def test_a_command_line_with_a_mistake_is_refused_in_two_lines_before_anything_happens(capsys, words, message):
    lines = refused(capsys, *words)
    assert message in lines[0]
    assert lines[1] == (f"see launch.py {words[0]} --help" if words[0] in commands.COMMANDS else "see launch.py --help")


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["train", "--data", "digits", "--mode", "random", "--out", "o", "--epoch", "3"], "--epoch: unknown flag"),
        (["reproduce", "--data", "digits", "--out", "o", "--rows", "fast:30"], "--rows fast:30: choose a mode of"),
    ],
)
def test_the_process_ends_with_status_2_and_no_traceback(words, first):
    done = subprocess.run([sys.executable, ROOT / "launch.py", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"launch.py: {first}"), done.stderr


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("train", [["--help"], ["train", "--help"], ["trian"], ["train", "-r"], [*TRAIN, "--lr", "x"]]),
        ("export", [["export", "--help"], ["export", "--checkpoint", "c.pt"]]),
        ("reproduce", [["reproduce", "--help"], ["reproduce", "--data", "d", "--out", "o", "--seeds", "x"]]),
    ],
)
def test_help_and_errors_about_options_load_neither_torch_nor_dali(name, lines):
    code = f"""
import contextlib, io, sys
from fast_spatial import commands
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    statuses = [commands.main(line) for line in {lines!r}]
print(statuses, sorted({{"torch", "numba", "torchvision", "nvidia", "sklearn", "tensorboard"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ("[0, 0, 2, 2, 2] []" if name == "train" else "[0, 2] []")


@pytest.mark.parametrize(
    "text",
    ["2012", "1e5", "0x10", "None", "True", "false", "[1, 2]", "{'a': 1}", "'quoted'", "-x", "a=b", "a b", "~", "-"],
)
def test_a_text_stays_the_text_that_was_typed(configured, text):
    assert configured("train", f"--data={text}", "--mode", "random", "--out", "o").data == text


def test_a_number_after_a_text_flag_stays_text(configured):
    config = configured("train", "--data", "2012", "--mode", "random", "--out", "1e5", "--rdzv-id", "7")
    assert (config.data, config.out, config.rdzv_id) == ("2012", "1e5", "7")


@pytest.mark.parametrize(
    "words",
    [
        ["--global-batch-size", "8"],
        ["--global_batch_size", "8"],
        ["--global-batch_size", "8"],
        ["--global-batch-size=8"],
        ["--global_batch_size=8"],
    ],
)
def test_hyphens_and_underscores_and_equals_signs_all_do(configured, words):
    assert configured(*TRAIN, *words).global_batch_size == 8


@pytest.mark.parametrize(
    ("words", "deterministic"),
    [
        ([], False),
        (["--deterministic"], True),
        (["--deterministic", "true"], True),
        (["--deterministic", "false"], False),
        (["--deterministic=True"], True),
        (["--deterministic=false"], False),
        (["--nodeterministic"], False),
        (["--no-deterministic"], False),
        (["--no_deterministic"], False),
    ],
)
def test_a_switch_can_be_set_and_unset(configured, words, deterministic):
    config = configured(*TRAIN, *words, "--seed", "3")
    assert config.deterministic is deterministic
    assert config.seed == 3


@pytest.mark.parametrize(
    ("words", "grid"), [([], True), (["--grid"], True), (["--nogrid"], False), (["--no-grid"], False)]
)
def test_a_switch_that_is_on_can_be_turned_off(configured, words, grid):
    assert configured(*EVALUATE, *words).grid is grid


@pytest.mark.parametrize("value", ["-0.5", "-1e-3", "-.5", "-5,10", "-3"])
def test_a_negative_number_is_a_value(value):
    assert read_flags(["--lr", value, "--seed", "3"], commands.COMMANDS["train"].options) == {"lr": value, "seed": "3"}


def test_the_flags_of_train_arrive_in_the_configuration(configured):
    config = configured(
        *TRAIN,
        "--translate-px",
        "12",
        "--milestones",
        "3,5",
        "--crop-scale=0.5,1",
        "--bn_group_size",
        "32",
        "--lr=5e-2",
    )
    assert (config.translate_px, config.milestones, config.crop_scale) == (12.0, (3, 5), (0.5, 1.0))
    assert (config.bn_group_size, config.lr, config.mode) == (32, 0.05, "random")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_lists_the_commands(capsys, words):
    assert commands.main(words) == 0
    text = capsys.readouterr().out
    for name, command in commands.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.help)}$", text, re.MULTILINE)


def listed(text: str) -> dict[str, str]:
    """What a help says about each flag."""
    _, *blocks = re.split(r"^  (?=--)", text, flags=re.MULTILINE)
    return {block.split()[0]: " ".join(block.split("\n\n")[0].split()) for block in blocks}


@pytest.mark.parametrize("name", commands.COMMANDS)
@pytest.mark.parametrize("ask", [["--help"], ["-h"], ["--epochs", "3", "--help"]])
def test_help_lists_every_flag_with_its_text_and_no_one_letter_flag(capsys, name, ask):
    assert commands.main([name, *ask]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    text = captured.out
    assert text.startswith(commands.COMMANDS[name].help)
    texts, options = listed(text), commands.COMMANDS[name].options
    assert set(texts) == {flag(option) for option in options}
    for option, field in options.items():
        words = re.sub(r"\(default: (\w+) = ", r"(\1: ", texts[flag(option)])
        assert field.metadata["help"] in words
        assert "|".join(field.metadata["choices"]) in words
    assert re.findall(r"(?<![\w-])-[A-Za-z]\b", text) == []
    assert len(set(texts.values())) == len(options)
    assert max(map(len, text.splitlines())) <= 120


def test_help_has_sections_and_what_is_required_comes_first(capsys):
    commands.main(["train", "--help"])
    text = capsys.readouterr().out
    headings = re.findall(r"^([a-z]+):$", text, flags=re.MULTILINE)
    assert headings == ["required", *SECTIONS]
    required = text[text.index("required:") : text.index("\ndata:")]
    assert list(listed(required)) == ["--data", "--mode", "--out"]
    assert "--data FOLDER --mode nocrop|standard|random|worst10 --out FOLDER [--flag value ...]" in text


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_default_that_is_printed_is_accepted_when_it_is_typed(capsys, name):
    commands.main([name, "--help"])
    found = {
        given: match[1]
        for given, text in listed(capsys.readouterr().out).items()
        if (match := re.search(r"\(default: ([^ )]+)", text))
    }
    options = commands.COMMANDS[name].options
    shown = {option for option, field in options.items() if field.default not in ("", None, ())}
    assert {given.removeprefix("--").replace("-", "_") for given in found} == shown
    words = [word for pair in found.items() for word in pair]
    values = read_flags(words, options)
    kinds = {field.name: kind for kind in KINDS[name] for field in dataclasses.fields(kind)}
    hints = {kind: typing.get_type_hints(kind) for kind in KINDS[name]}
    for option, text in values.items():
        assert convert(option, text, hints[kinds[option]][option]) == options[option].default


@pytest.mark.parametrize("old", sorted(RENAMED))
@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_flag_that_was_renamed_is_refused_with_its_new_name(capsys, name, old):
    new = RENAMED[old]
    first, _ = refused(capsys, name, flag(old), "1")
    if new in commands.COMMANDS[name].options:
        assert first == f"launch.py: {flag(old)}: renamed to {flag(new)}"
    else:
        assert first.startswith(f"launch.py: {flag(old)}: unknown flag")


def test_a_command_that_was_renamed_is_refused_with_its_new_name(capsys):
    assert refused(capsys, "check", "--data", "d")[0] == "launch.py: check: renamed to check-data"


def test_every_command_is_known_to_its_tasks_and_sets_the_environment_once(monkeypatch, capsys):
    """Also to those that run in this process."""
    for name in ("FAST_SPATIAL_COMMAND", "OMP_WAIT_POLICY", "PYTHONPATH"):
        monkeypatch.setenv(name, "before")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(sys, "argv", ["launch.py", "recipes", "a b"])
    for _ in range(2):
        assert commands.main(["recipes"]) == 0
    assert os.environ["FAST_SPATIAL_COMMAND"] == "launch.py recipes 'a b'"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    folder, *others = os.environ["PYTHONPATH"].split(os.pathsep)
    assert (Path(folder) / "fast_spatial" / "commands.py").is_file() and others == ["before"]


def test_the_recipes_are_listed(capsys):
    assert commands.main(["recipes"]) == 0
    assert "fast: A short recipe" in capsys.readouterr().out


def defaults(command: str) -> dict[str, Any]:
    return {name: field.default for name, field in commands.COMMANDS[command].options.items()}


def test_the_options_of_train_are_the_frozen_ones():
    assert defaults("train") == TRAIN_OPTIONS


def test_the_options_of_the_other_commands_are_the_frozen_ones():
    assert defaults("evaluate") == EVALUATE_OPTIONS
    assert defaults("landscape") == LANDSCAPE_OPTIONS
    assert defaults("report") == REPORT_OPTIONS
    assert defaults("export") == EXPORT_OPTIONS
    assert defaults("check-data") == CHECK_OPTIONS
    assert defaults("recipes") == {}
    assert defaults("bench") == BENCH_OPTIONS
    assert defaults("doctor") == DOCTOR_OPTIONS


@pytest.mark.parametrize(
    ("words", "what"),
    [(["warp"], "warp"), (["--what", "step"], "step"), ([], "all"), (["grid", "--rounds", "1"], "grid")],
)
def test_the_part_to_measure_may_come_first(monkeypatch, words, what):
    asked = []

    def start(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", start)
    with pytest.raises(SystemExit) as ended:
        commands.main(["bench", *words])
    assert ended.value.code == 0
    assert json.loads(asked[0][-1])["what"] == what


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["wrap"], "--what wrap: choose one of warp, pipeline"),
        (["warp", "step"], "step: unexpected word"),
        (["warp", "--what", "step"], "--what: given twice"),
        (["--checkpoint", "a.pt"], "--checkpoint a.pt: requires --data"),
        (["pipeline", "--data", "nowhere"], "nowhere"),
        (["--ffcv-python", "nowhere/python"], "--ffcv-python nowhere/python: no such file"),
        (["warp", "--read-latency-ms", "5"], "--read-latency-ms 5: requires bench pipeline"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--seconds", "0"], "--seconds 0: must be more than 0"),
    ],
)
def test_a_benchmark_that_cannot_work_is_refused(capsys, words, expected):
    assert expected in refused(capsys, "bench", *words)[0]


@pytest.mark.parametrize(
    ("words", "runs"),
    [(["a"], ["a"]), (["a", "b c", "--out", "o"], ["a", "b c"]), (["--runs", "a,b", "--out", "o"], ["a", "b"])],
)
def test_the_folders_of_a_report_may_come_first(monkeypatch, words, runs):
    asked: list[Any] = []
    monkeypatch.setattr(report, "write_report", lambda *given: asked.append(given))
    assert commands.main(["report", *words]) == 0
    assert asked == [([Path(run) for run in runs], Path("o" if len(runs) > 1 else "a"), 0.0)]


def test_a_report_of_no_run_is_refused(capsys, tmp_path):
    first, second = refused(capsys, "report", str(tmp_path))
    assert first == f"launch.py: {tmp_path}: contains no run"
    assert second == "name the --out folder of train or reproduce"
    assert list(tmp_path.iterdir()) == []


def test_rates_on_gpus_are_refused_without_one(capsys, monkeypatch):
    monkeypatch.setattr(preflight, "gpu_count", lambda: 0)
    first, second = refused(capsys, "bench", "gpu")
    assert first == "launch.py: bench gpu: no GPU is visible"
    assert "launch.py doctor" in second


@pytest.mark.parametrize("command", ["bench", "doctor"])
def test_a_result_that_could_not_be_written_is_refused_before_it_is_made(capsys, monkeypatch, command):
    monkeypatch.setattr(os, "access", lambda *_: False)
    first, second = refused(capsys, command, "--json", "new/result.json")
    assert first.endswith("cannot be written")
    assert second == "name a file in another folder"


def test_reproduce_takes_its_own_options_and_those_of_the_recipe():
    expected = {k: v for k, v in TRAIN_OPTIONS.items() if k not in REPRODUCE_DECIDES}
    assert defaults("reproduce") == {**expected, "rows": (), "seeds": (0,)}


def test_options_that_commands_share_agree_on_whether_they_decide_numbers():
    """Plans and runs are told apart by these; which declaration a command reads must not matter."""
    train, reproduce = (
        {f.name: decides_numbers(f) for f in dataclasses.fields(kind)} for kind in (TrainConfig, ReproduceConfig)
    )
    shared = train.keys() & reproduce.keys()
    assert {"data", "out"} <= shared
    assert {name: train[name] for name in shared} == {name: reproduce[name] for name in shared}
