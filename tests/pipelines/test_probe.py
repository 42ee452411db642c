"""Decoders are tried in child processes: whatever one does, the chosen one gives correct pixels."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fast_spatial.errors import UserError
from fast_spatial.kernels.host import cache_folder, one_at_a_time, recall, remember
from fast_spatial.pipelines import ops
from fast_spatial.pipelines.inspection import probe, probe_child, specimens
from fast_spatial.pipelines.inspection.probe import choose
from fast_spatial.pipelines.inspection.probe_child import decode_with, examine
from fast_spatial.pipelines.inspection.specimens import COUNT, Difference, batches, difference
from fast_spatial.pipelines.placement import HW_DECODER_LOAD, RUNGS, Decoding
from tests.helpers.decoder_faults import (
    MARK,
    PROGRAMS,
    RIGHT,
    SPOILED,
    TIMEOUT_SEC,
    choose_with,
    command_of,
    noisy,
    quarter_black,
    shifted_x,
    shifted_y,
)

ROOT = Path(__file__).parents[2]
WRONG = r"wrong pixels: .+ \(rows \d+ to \d+, columns \d+ to \d+\), in a batch of 64: mean difference [\d.]+/255 .+"
# What is detected of every fault.
DETECTED = {
    "none": "",
    "crashes": r"crashed \(SIGSEGV\): a library's last words",
    "ends with an error": r"ended with exit status 1: nvImageCodec failure: '#8'",
    "reports an error": r"an error: nvImageCodec failure: '#8'",
    "fails on a kind": r"an error: nvImageCodec failure: '#8' \(on CMYK\)",
    "hangs": r"no answer within 6 s",
    "hangs until its alarm": r"no answer within 600 s",
    "prints garbage": r"invalid answer",
    "prints a list": r"invalid answer",
    "prints nothing": r"invalid answer",
    "warns of regions": r"nvImageCodec warns of wrong regions with this nvJPEG \(13\.2 is needed\)",
    "prints no numbers": r"invalid answer",
    "compares nothing": r"invalid answer",
    "prints bad numbers": r"wrong pixels: mean difference 0.40/255 \(at most 2\), 2.00% of pixels beyond 16/255 .+",
    "is right, then crashes": r"crashed \(SIGABRT\)",
    "shifted by one column": WRONG,
    "shifted by one row": WRONG,
    "a quarter black": WRONG,
    "the neighbour's image": WRONG,
    "noise of 2/255": "",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A separate cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def files():
    return specimens.specimens()


@pytest.fixture(scope="module")
def decoded(files):
    """Every specimen's pixels, whole."""
    whole = [[specimens.Region(k, 0, 0, file.height, file.width)] for k, file in enumerate(files)]
    return [pixels for (pixels,) in decode_with(Decoding("cpu"))(files, whole)]


def test_the_specimens_are_of_all_kinds(files):
    kinds = {file.kind for file in files}
    assert len(files) == COUNT == 30 and len(kinds) == 10
    with_progression = [file for file in files if b"\xff\xc2" in file.content]
    assert len(with_progression) == 6 and all("progressive" in file.name for file in with_progression)
    modes = {Image.open(io.BytesIO(file.content)).mode for file in files}
    assert modes == {"RGB", "L", "CMYK"}
    assert max(file.height * file.width for file in files) > 1500 * 1000 and min(file.height for file in files) < 48


def test_the_decoder_is_asked_for_what_the_files_hold(files, decoded):
    for number, (file, pixels) in enumerate(zip(files, decoded)):
        assert pixels.shape == (file.height, file.width, 3)
        original = specimens.picture(number, file.height, file.width)
        if "grey" not in file.name and "CMYK" not in file.name:
            assert difference(pixels, original).mean < 8, file.name


@pytest.mark.parametrize("spoil", [shifted_x, shifted_y, quarter_black], ids=lambda spoil: spoil.__name__)
def test_a_fault_is_found_on_every_image(files, decoded, spoil):
    for file, pixels in zip(files, decoded):
        off = difference(spoil(pixels), pixels)
        assert off.mean > 4 and off.far_share > 0.05, file.name


def test_a_neighbour_is_found_on_every_image(files, decoded):
    for k, file in enumerate(files):
        for j in ((k - 1) % len(files), (k + 1) % len(files)):
            neighbour = specimens.picture(j, file.height, file.width)
            own = specimens.picture(k, file.height, file.width)
            assert not difference(neighbour, own).is_right, file.name


def test_a_fault_is_found_in_every_region(files, decoded):
    for batch in batches(files, full=64, count=3):
        for region in batch:
            bottom, right = region.y + region.height, region.x + region.width
            pixels = decoded[region.specimen][region.y : bottom, region.x : right]
            assert pixels.shape == (region.height, region.width, 3)
            assert difference(noisy(pixels), pixels).is_right
            for spoil in (shifted_x, shifted_y, quarter_black):
                assert not difference(spoil(pixels), pixels).is_right, files[region.specimen].name


def test_small_differences_are_right(decoded):
    assert all(difference(noisy(pixels), pixels).is_right for pixels in decoded)
    assert not difference(decoded[0], decoded[0][1:]).is_right
    assert Difference(2.0, 0.01).is_right
    assert not Difference(2.01, 0.0).is_right
    assert not Difference(0.0, 0.0101).is_right


def test_most_regions_start_at_odd_offsets(files):
    singles = batches(files, full=64, count=2)
    assert [len(batch) for batch in singles] == [1] * COUNT + [64] * 2
    regions = [region for batch in singles for region in batch]
    assert np.mean([region.y % 2 and region.x % 2 for region in regions]) > 0.9
    assert {region.specimen for region in regions[COUNT:]} == set(range(COUNT))


def test_whole_images_are_cropped_as_regions_are(monkeypatch):
    on_cpu = ops.decoder_options(Decoding("cpu"))
    monkeypatch.setattr(ops, "decoder_options", lambda _: on_cpu)
    monkeypatch.setattr(probe_child, "_device_id", lambda _: None)
    found = examine(decode_with(Decoding("gpu-full")), device="cpu")
    assert found.fault == ""
    assert found.worst_mean < 1e-3


@pytest.mark.parametrize("fault", [*PROGRAMS, *SPOILED])
def test_a_fault_leads_to_the_next_rung(fault):
    choice = choose_with(fault)
    assert re.fullmatch(DETECTED[fault], choice.trials[0].fault), choice.trials[0].fault
    assert choice.decoding == RUNGS[bool(DETECTED[fault])]
    assert choice.message.startswith(f"decoding: {choice.decoding} (probed: at most ")
    assert "\n" not in choice.message
    assert (f"not {RUNGS[0]}: {choice.trials[0].fault}" in choice.message) == bool(DETECTED[fault])
    assert choice.trials[0].seconds < TIMEOUT_SEC  # one that hangs ends at its own alarm


def test_every_fault_is_tried():
    assert DETECTED.keys() == PROGRAMS.keys() | SPOILED.keys()


def test_the_cpu_is_the_end():
    choice = choose_with("crashes", "prints nothing", "ends with an error")
    assert choice.decoding == Decoding("cpu")
    assert [trial.decoding for trial in choice.trials] == list(RUNGS[:3])
    assert choice.message == (
        "decoding: CPU (not GPU, regions, 65% by the JPEG engine: crashed (SIGSEGV): a library's last words; "
        "not GPU, regions, without the JPEG engine: invalid answer; "
        "not GPU, whole images, without the JPEG engine: ended with exit status 1: nvImageCodec failure: '#8')"
    )
    assert json.loads(json.dumps(choice.to_json()))["trials"][1]["fault"] == "invalid answer"


def test_what_hangs_is_killed_with_its_children():
    choose_with("hangs")
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert MARK not in listed


def test_a_child_that_cannot_be_killed_is_left(monkeypatch):
    left = []
    wait = subprocess.Popen.wait

    def held(child: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        assert timeout is not None and timeout < 10
        left.append(child)
        raise subprocess.TimeoutExpired(child.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", held)
    trial, *_ = probe.try_rung(RUNGS[0], command=command_of("none"), timeout_sec=5)
    assert trial.fault == "no answer within 5 s"
    assert len(left) == 2
    wait(left[0])


def test_a_finding_is_remembered():
    first, second = choose_with("crashes"), choose_with("crashes", "crashes", "crashes")
    assert second.decoding == first.decoding == RUNGS[1]
    assert [trial.remembered for trial in second.trials] == [True, True]
    assert second.message == first.message.replace("probed:", "probed earlier:")


def test_without_the_engine_its_rung_is_left_out():
    choice = choose("auto", on_gpu=True, hw_decoder_load=0.0, command=command_of("none"))
    assert [trial.decoding for trial in choice.trials] == [RUNGS[1]]


def test_another_share_is_another_finding():
    choose_with("crashes")
    choice = choose("auto", on_gpu=True, hw_decoder_load=0.9, command=command_of("none"))
    assert choice.decoding == Decoding("gpu", 0.9)


@pytest.mark.parametrize("what", ["gpus", "visible", "driver", "versions", "code"])
def test_a_finding_holds_for_its_machine_and_versions(what, monkeypatch):
    choose_with("crashes")
    about = probe._about()
    monkeypatch.setattr(probe, "_about", lambda: {**about, what: "another"})
    assert choose_with("none").decoding == RUNGS[0]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"fault": ""}', b"\xff\xfe", b'{"fault": "", "at": 1, "seconds": "x"}']
)
def test_a_memory_that_cannot_be_read_is_ignored(content):
    choose_with("none")
    kept = list(cache_folder().glob("decoder-probe-*.json"))
    assert len(kept) == 1
    kept[0].write_bytes(content)
    choice = choose_with("none")
    assert choice.decoding == RUNGS[0] and not choice.trials[0].remembered


def test_what_pixels_depend_on_is_part_of_a_finding(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    about = probe._about()
    assert about["visible"] == "1"
    assert {"torch", "torchvision", "numba", "numpy", "pillow"} <= about["versions"].keys()
    code = (ROOT / "pipelines" / "nvjpeg.py").read_bytes()
    monkeypatch.setattr(Path, "read_bytes", lambda path: code + b"#" if path.name == "nvjpeg.py" else b"")
    changed = probe._about()
    monkeypatch.setattr(Path, "read_bytes", lambda path: code if path.name == "nvjpeg.py" else b"")
    assert changed["code"] != probe._about()["code"]


@pytest.mark.parametrize(
    ("fault", "lasts"),
    [
        ("", True),
        ("wrong pixels: grey 3, in a batch of 64: mean difference 5.00/255 (at most 2)", True),
        (probe._IS_UNTRUSTED, True),
        *((f"crashed ({name}): last words", True) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE")),
        ("crashed (SIGABRT): terminate called: out of memory", False),
        ("crashed (SIGKILL)", False),
        ("crashed (SIGTERM)", False),
        ("ended with exit status 1: wrong pixels", False),
        ("an error: CUDA allocation failed", False),
        ("an error: all CUDA-capable devices are busy or unavailable", False),
        ("invalid answer", False),
        ("no answer within 60 s", False),
    ],
)
def test_what_another_process_may_have_done_is_not_kept_for_good(fault, lasts, monkeypatch):
    about = {"gpus": ["a GPU"]}
    right = {"worst_mean": 0.4, "worst_far_share": 0.0, "images": 7}
    monkeypatch.setattr(probe, "time", SimpleNamespace(time=lambda: 10_000.0))
    for at, believed in ((6_400.0, True), (6_399.0, lasts)):
        remember(probe._file(RUNGS[0], about), {**right, "fault": fault, "seconds": 1.0, "at": at})
        assert (probe._recalled(RUNGS[0], about) is not None) == believed


@pytest.mark.parametrize(("fault", "believed"), [("hangs", False), ("ends with an error", False), ("crashes", True)])
def test_what_may_pass_is_believed_for_an_hour(fault, believed):
    choose_with(fault)
    assert choose_with("none").decoding == RUNGS[1]
    for path in cache_folder().glob("decoder-probe-*.json"):
        remember(path.name, {**recall(path.name), "at": time.time() - 3601})
    assert (choose_with("none").decoding == RUNGS[1]) == believed


def test_a_decoder_that_is_asked_for_is_not_probed():
    for name, rung in (("gpu", RUNGS[0]), ("gpu-full", RUNGS[2]), ("cpu", RUNGS[3])):
        choice = choose(name, on_gpu=True, hw_decoder_load=HW_DECODER_LOAD, command=command_of("crashes"))
        assert choice.decoding == rung and choice.trials == ()
        assert choice.message == f"decoding: {rung} (as requested, not probed)"


def test_without_a_gpu_nothing_is_probed():
    assert choose("auto", on_gpu=False, hw_decoder_load=0.65).message == "decoding: CPU (no GPU in use)"
    with pytest.raises(UserError, match="--decode gpu-full needs a GPU"):
        choose("gpu-full", on_gpu=False, hw_decoder_load=0.65)


def test_processes_wait_for_the_one_that_probes():
    order = []

    def second() -> None:
        with one_at_a_time("decoder-probe"):
            order.append("second")

    with one_at_a_time("decoder-probe"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_that_cannot_be_made_does_not_matter(tmp_path):
    with one_at_a_time("decoder-probe"):  # makes the folder
        pass
    (tmp_path / "fast_spatial" / "decoder-probe.lock").unlink()
    (tmp_path / "fast_spatial" / "decoder-probe.lock").mkdir()
    assert choose_with("none").decoding == RUNGS[0]


def test_the_device_is_busy_within_the_block(monkeypatch):
    done = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *words, **options: done.append(mm(*words, **options)))
    with probe_child.keep_busy("cpu"):
        assert done


def test_a_device_that_cannot_be_kept_busy_is_a_fault(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(torch, "mm", fail)
    with pytest.raises(RuntimeError, match="out of memory"), probe_child.keep_busy("cpu"):
        pass


def test_a_cache_that_takes_nothing_does_not_matter(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert choose_with("none").decoding == RUNGS[0]
    assert recall("anything.json") is None


@pytest.mark.slow
def test_the_command_line_prints_a_line_for_every_rung():
    done = subprocess.run(
        [sys.executable, "-m", "fast_spatial.pipelines.inspection.probe", "--all"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    about, *rungs, end = map(json.loads, done.stdout.splitlines())
    assert about["about"]["versions"]["torch"]
    assert [rung["rung"] for rung in rungs] == [str(rung) for rung in RUNGS]
    assert rungs[-1]["result"] == "right: at most 0.00/255 from the CPU, 0.00% of pixels beyond 16/255"
    assert rungs[-1]["images"] == 2 * COUNT + 64 * 3 * 5
    assert len(rungs[-1]["kinds"]) == 10
    assert all(rung["seconds"] > 0 for rung in rungs)
    assert end == {"decoding": next(rung["rung"] for rung in rungs if not rung["fault"])}
    assert RIGHT.keys() <= rungs[0].keys()
