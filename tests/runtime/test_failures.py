"""Failures of processes: a user's error is shown in two lines, any other exception with its traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fast_spatial import launcher
from fast_spatial.errors import UserError
from fast_spatial.runtime.failures import leave_failure, user_error_of

ROOT = Path(__file__).parents[2]
WORDS = ["train", "--data", "digits", "--mode", "nocrop", "--epochs", "1", "--max-train-images", "64", "--out", "run"]
WORDS += ["--nproc-per-node", "2"]


def run(folder: Path, planted: str) -> subprocess.CompletedProcess[str]:
    """A training that runs planted code before every step."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.argv[0] == '-m':\n"  # a process that torchrun started
        "    from fast_spatial.training.step import TrainStep\n"
        "    def step(*_):\n"
        f"        {planted}\n"
        "    TrainStep.__call__ = step\n"
    )
    path = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *WORDS],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_an_exception_deep_in_a_process_keeps_its_traceback_and_names_the_rank(tmp_path):
    ended = run(tmp_path, "import torch; torch.nn.functional.batch_norm(torch.ones(1, 3), None, None, training=True)")
    assert ended.returncode == 1
    assert "rank 0:" in ended.stderr or "rank 1:" in ended.stderr
    assert f'File "{tmp_path}/sitecustomize.py", line 5, in step' in ended.stderr
    assert "nn/functional.py" in ended.stderr
    assert "ValueError: Expected more than 1 value per channel when training" in ended.stderr
    assert "failed with exit status 1: ValueError: Expected more than 1 value" in ended.stderr.splitlines()[-1]


def test_a_users_error_in_a_process_is_shown_in_two_lines(tmp_path):
    ended = run(tmp_path, "from fast_spatial.errors import UserError; raise UserError('--lr 3: too much', 'less')")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-2:] == ["launch.py: --lr 3: too much", "less"]


def failure(folder: Path, error: Exception, timestamp: int) -> SimpleNamespace:
    """torchrun's `ProcessFailure` of a process that recorded an exception."""
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / "error.json")
    leave_failure(error)
    left = json.loads((folder / "error.json").read_text())
    return SimpleNamespace(message=left["message"], timestamp=timestamp, exitcode=1, error_file_data=left)


def test_a_users_error_is_carried_as_data_and_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")
    lost = failure(tmp_path, RuntimeError("the other process is gone"), 1)
    wrong = failure(tmp_path, UserError("--x 1: wrong\tin\nits text", "do that"), 2)
    found = user_error_of(wrong)
    assert found is not None and (found.message, found.advice) == ("--x 1: wrong\tin\nits text", "do that")
    assert user_error_of(lost) is None
    assert launcher._report({0: lost, 1: wrong}) == 1
    assert capsys.readouterr().err == "launch.py: --x 1: wrong\tin\nits text\ndo that\n"
    assert launcher._report({0: lost}) == 1
    assert capsys.readouterr().err == (
        "launch.py: rank 0 failed with exit status 1: RuntimeError: the other process is gone\n"
    )


@pytest.mark.parametrize("message", ["UserError: a text that reads like one", "ValueError: --lr 1: so do these"])
def test_a_text_that_looks_like_a_users_error_is_none(tmp_path, monkeypatch, message):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")
    assert user_error_of(failure(tmp_path, ValueError(message), 1)) is None
