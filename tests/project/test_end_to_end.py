"""The commands as a user gives them, through torchrun, in one and two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fast_spatial.commands import main

ROOT = Path(__file__).parents[2]
SMALL = ("--max-train-images", "64", "--epochs", "1", "--views", "2", "--global-batch-size", "32")


def launch(*words: object, timeout: int = 1800) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd="/",
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A worst10 model trained for an epoch in two processes."""
    out = tmp_path_factory.mktemp("run") / "worst10"
    ended = launch("train", "--data", "digits", "--mode", "worst10", "--out", out, "--nproc-per-node", 2, *SMALL)
    assert ended.returncode == 0, ended.stderr
    return out, ended


def test_two_processes_train_and_leave_a_whole_run(run):
    out, ended = run
    names = {"best.pt", "last.pt", "previous.pt", "config.json", "environment.jsonl", "log.jsonl", "tensorboard"}
    assert names == {path.name for path in out.iterdir()}
    assert "64 training and 300 validation images" in ended.stdout
    assert "2 x 16 on CPU" in ended.stdout
    assert "it/s" not in ended.stdout + ended.stderr  # no progress bar where there is no terminal


def test_one_and_two_processes_judge_alike(run, tmp_path):
    out, _ = run
    words = ["evaluate", "--checkpoint", str(out / "best.pt"), "--data", "digits", "--max-images", "20"]
    assert main([*words, "--json", str(tmp_path / "1.json"), "--in-process"]) == 0
    ended = launch(*(*words, "--json", tmp_path / "2.json", "--nproc-per-node", 2, "--batch-size-per-process", 7))
    assert ended.returncode == 0, ended.stderr
    assert "PARTIAL" in ended.stdout
    reports = {processes: json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2)}
    assert reports[1]["images"] == reports[2]["images"]
    views = [reports[processes]["summary"].pop("grid_views_per_image") for processes in (1, 2)]
    assert all(1 <= number <= 775 for number in views)
    for report in reports.values():
        del report["summary"]["grid_views_per_broken_image"], report["summary"]["near_ties"]
    assert reports[1]["summary"] == reports[2]["summary"]
    assert reports[1]["summary"]["partial"]
    assert reports[1]["summary"]["num_images"] == 20
    first = reports[1]["images"][0]
    assert first["path"].startswith("val/")
    assert isinstance(first["natural"], bool)


@pytest.mark.slow
def test_counts_depend_on_neither_processes_nor_batches_and_on_the_judging_shape_only_in_near_ties(run, tmp_path):
    out, _ = run
    reports = {}
    for processes, batch, judged in ((1, 128, 0), (2, 7, 0), (3, 50, 0), (1, 128, 33), (1, 128, 500)):
        words = ["evaluate", "--checkpoint", out / "best.pt", "--data", "digits", "--json", tmp_path / "found.json"]
        words += ["--nproc-per-node", processes, "--batch-size-per-process", batch, "--views-per-forward", judged]
        ended = launch(*words)
        assert ended.returncode == 0, ended.stderr
        reports[processes, batch, judged] = json.loads((tmp_path / "found.json").read_text())
    first = reports[1, 128, 0]
    assert len(first["images"]) == 300
    assert reports[2, 7, 0]["images"] == reports[3, 50, 0]["images"] == first["images"]
    verdicts = ("natural", "random", "worst10", "worst10_any", "grid")
    for judged in (33, 500):
        other = reports[1, 128, judged]
        for mine, theirs in zip(first["images"], other["images"]):
            same = [mine[name] for name in verdicts] == [theirs[name] for name in verdicts]
            assert same or mine["path"] in first["near_ties"] + other["near_ties"]


COMPARISONS = ["warp.opencv", "warp.grid_sample", "warp.dali_cpu"]
COMPARISONS += [f"pipeline.{mode}" for mode in ("standard", "random", "worst10")]
COMPARISONS += ["score.11views", "step.worst10", "step.worst10_score16", "grid"]


def test_the_benchmark_compares_every_part_and_says_what_limits_training(run, tmp_path):
    """On few and small images: what is said about speed here means nothing, and is not asked."""
    out, _ = run
    words = ["--data", "digits", "--checkpoint", out / "best.pt", "--image-size", 32, "--rounds", 1, "--seconds", 0.01]
    ended = launch("bench", "all", *words, "--grid-images", 2, "--json", tmp_path / "bench.json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    compared = {row["name"]: row for row in found["comparisons"]}
    assert set(COMPARISONS) <= compared.keys() | found["skipped"].keys()
    assert found["skipped"].keys() <= {"warp.opencv", "pipeline.ffcv_jpg"}
    for row in compared.values():
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert 0 < row["ours"]["min"] <= row["ours"]["median"] <= row["ours"]["max"]
        assert 0.1 < row["ratio"] / (row["ours"]["median"] / row["baseline"]["median"]) < 10
    assert compared["grid"]["same_answer"] == "2 of 2 images"
    assert found["facts"]["score_side"]["images"] == 256
    assert any("is the bottleneck" in line for line in found["verdict"])
    for text in ("warp.grid_sample", "pipeline.ffcv_jpg", "skipped", "what to do"):
        assert text in ended.stdout


@pytest.mark.slow
def test_a_rotten_file_is_named_and_ends_a_training_in_status_1(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            (tmp_path / "data" / split / name / "rotten.jpg").write_bytes(b"not an image")
    ended = launch(
        *("train", "--data", tmp_path / "data", "--mode", "standard", "--out", tmp_path / "run"),
        *("--global-batch-size", 2, "--epochs", 1, "--image-size", 32),
    )
    assert ended.returncode == 1
    *_, what, advice = ended.stderr.splitlines()
    assert what.startswith(f"launch.py: {tmp_path}/data/train/")
    assert "cannot be decoded" in what
    assert "launch.py check-data" in advice


@pytest.mark.slow
def test_reproduce_shows_the_trend_of_the_paper(tmp_path):
    ended = launch("reproduce", "--data", "digits", "--out", tmp_path, timeout=7200)
    assert ended.returncode == 0, ended.stderr
    rows = {row["mode"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert all(row["natural_top1_pct"] >= 96 for row in rows.values())
    assert rows["standard"]["grid_top1_pct"] <= 5
    assert rows["random"]["grid_top1_pct"] >= rows["standard"]["grid_top1_pct"] + 10
    assert rows["worst10"]["grid_top1_pct"] >= rows["random"]["grid_top1_pct"] + 10
    again = launch("reproduce", "--data", "digits", "--out", tmp_path)
    assert again.stdout.count("already done") == 4
