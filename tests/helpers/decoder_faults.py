"""Stand-ins for faulty decoders, and a table of the outcome of each.

python -m tests.helpers.decoder_faults          prints the table
python -m tests.helpers.decoder_faults FAULT    acts as a child of the probe with a faulty decoder
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from fast_spatial.pipelines.inspection import probe_child
from fast_spatial.pipelines.inspection.probe import Choice, Command, choose
from fast_spatial.pipelines.inspection.probe_child import Pixels, decode_with, serve
from fast_spatial.pipelines.inspection.specimens import Region, Specimen, specimens
from fast_spatial.pipelines.placement import HW_DECODER_LOAD, Decoding

# Of children that answer or end by themselves, however busy the machine is.
TIMEOUT_SEC = 600.0
# In the arguments of this process's children, and of theirs, alone: seconds to sleep.
MARK = f"600.{os.getpid()}"
RIGHT = {"worst_mean": 0.4, "worst_far_share": 0.001, "images": 7, "fault": ""}


def shifted_x(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.roll(image, 1, axis=1)


def shifted_y(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.roll(image, 1, axis=0)


def quarter_black(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    black = image.copy()
    black[image.shape[0] // 2 :, image.shape[1] // 2 :] = 0
    return black


def noisy(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(-2, 3, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


# A single image of 64 is wrong, or, noisy, all are.
_VICTIM = 17


def _spoil_one(pixels: Pixels, spoil: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Pixels:
    return [spoil(image) if index == _VICTIM else image for index, image in enumerate(pixels)]


def _swap_two(pixels: Pixels) -> Pixels:
    swapped = [*pixels]
    if len(pixels) > _VICTIM:  # of the same shape, as whole images of a data set may be
        neighbour, shape = pixels[_VICTIM + 1], pixels[_VICTIM].shape
        swapped[_VICTIM] = np.resize(neighbour, shape)
    return swapped


SPOILED: dict[str, Callable[[Pixels], Pixels]] = {
    "shifted by one column": lambda pixels: _spoil_one(pixels, shifted_x),
    "shifted by one row": lambda pixels: _spoil_one(pixels, shifted_y),
    "a quarter black": lambda pixels: _spoil_one(pixels, quarter_black),
    "the neighbour's image": _swap_two,
    "noise of 2/255": lambda pixels: [noisy(image) for image in pixels],
}


def _crash() -> None:
    print("a library's last words", file=sys.stderr, flush=True)
    ctypes.string_at(0)


def _fail() -> None:
    raise SystemExit("nvImageCodec failure: '#8'")


def _error(*kinds: str) -> None:
    """Fails on files of some kinds, or on all."""

    def decode(files: list[Specimen], wanted: list[list[Region]]) -> Iterator[Pixels]:
        for batch, pixels in zip(wanted, decode_with(Decoding("cpu"))(files, wanted)):
            if not kinds or {files[region.specimen].kind for region in batch} & set(kinds):
                raise RuntimeError(
                    "Error in MIXED operator\nencountered:\n\nnvImageCodec failure: '#8'\nCurrent pipeline"
                )
            yield pixels

    serve(decode, device="cpu", timeout_sec=TIMEOUT_SEC)


def _hang() -> None:
    """Hangs in C, ignores the alarm, and has a child that holds the output open."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    subprocess.Popen(["sleep", sys.argv[2]])
    ctypes.PyDLL(None).pause()


def _abort() -> None:
    print(json.dumps(RIGHT), flush=True)
    os.abort()


def _slow() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    time.sleep(600)


PROGRAMS: dict[str, Callable[[], object]] = {
    "none": lambda: print(json.dumps(RIGHT)),
    "crashes": _crash,
    "ends with an error": _fail,
    "reports an error": _error,
    "fails on a kind": lambda: _error("CMYK"),
    "hangs": _hang,
    "hangs until its alarm": _slow,
    "prints garbage": lambda: print("3 of 7 images\nall well"),
    "prints a list": lambda: print("[1, 2]"),
    "prints nothing": lambda: None,
    "warns of regions": lambda: print(f"[WARNING] it may produce wrong results on image edge\n{json.dumps(RIGHT)}"),
    "prints no numbers": lambda: print(json.dumps({**RIGHT, "worst_mean": float("nan")})),
    "compares nothing": lambda: print(json.dumps({**RIGHT, "images": 0})),
    "prints bad numbers": lambda: print(json.dumps({**RIGHT, "worst_far_share": 0.02})),
    "is right, then crashes": _abort,
}


def run(fault: str) -> None:
    """The program of a child with a fault."""
    few = [file for file in specimens() if file.height * file.width < 1 << 20]
    mock.patch.multiple(probe_child, specimens=lambda: few, _FULL_BATCHES=1, _BUSY_REPEATS=1).start()
    if fault in PROGRAMS:
        PROGRAMS[fault]()
        return

    def decode(files: list[Specimen], wanted: list[list[Region]]) -> Iterator[Pixels]:
        return map(SPOILED[fault], decode_with(Decoding("cpu"))(files, wanted))

    serve(decode, device="cpu", timeout_sec=TIMEOUT_SEC)


def command_of(*faults: str) -> Command:
    """Commands of children with these faults, in order; later children have none."""
    turns = iter(faults)

    def command(rung: Decoding, timeout_sec: float) -> list[str]:
        fault = next(turns, "none")
        if fault == "none":  # soon done, however busy the machine is: it imports nothing
            return [sys.executable, "-S", "-c", f"print({json.dumps(RIGHT)!r})"]
        return [sys.executable, "-m", "tests.helpers.decoder_faults", fault, MARK]

    return command


def choose_with(*faults: str) -> Choice:
    """The choice if the rungs' decoders have these faults."""
    hangs = "hangs" in faults
    return choose(
        "auto",
        on_gpu=True,
        hw_decoder_load=HW_DECODER_LOAD,
        command=command_of(*faults),
        timeout_sec=6.0 if hangs else TIMEOUT_SEC,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1])
    else:
        for name in [*PROGRAMS, *SPOILED]:
            # A separate cache: results of stand-ins must not be cached for this machine.
            with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
                choice = choose_with(name)
            print(json.dumps({"fault": name, "read": choice.message, "found": [asdict(t) for t in choice.trials]}))
