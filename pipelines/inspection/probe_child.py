"""The child process of a trial: decode specimens on a rung, and compare them with DALI's decoding on the CPU.

The result is the last line of its standard output, as JSON. A faulty decoder may end this process in any way, or make
it hang; the parent (`pipelines.inspection.probe`) handles all of them.

    python -m fast_spatial.pipelines.inspection.probe_child ON HW_DECODER_LOAD TIMEOUT_SEC
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def

from fast_spatial.kernels.host import cpus_per_process
from fast_spatial.pipelines.inspection.decoding import reason_of
from fast_spatial.pipelines.inspection.specimens import (
    FAR,
    MOST_FAR_SHARE,
    MOST_MEAN,
    Difference,
    Region,
    Specimen,
    batches,
    difference,
    specimens,
)
from fast_spatial.pipelines.ops import decode_box
from fast_spatial.pipelines.placement import Decoding

FULL_BATCH = 64
_FULL_BATCHES = 3
# Races are rare, so full batches beside matrix products are decoded this often.
_BUSY_REPEATS = 4
_BUSY_SIDE = {"cuda": 8192, "cpu": 256}
_BUSY_LAUNCHES = 8

Pixels = list[NDArray[np.uint8]]
# Decodes batches of regions, one after another: uint8 [H, W, 3] for each region.
Decode = Callable[[list[Specimen], list[list[Region]]], Iterator[Pixels]]


class Measured(NamedTuple):
    """Largest differences (`Difference`), overall and by kind; `fault`: the first one out of tolerance, or ""."""

    worst_mean: float
    worst_far_share: float
    images: int
    fault: str
    kinds: dict[str, list[float]]


@pipeline_def
def _region_graph(source: Callable[[Any], Any], decoding: Decoding) -> Any:
    encoded, start, shape = fn.external_source(source, num_outputs=3, batch=True, batch_info=True)
    return decode_box(encoded, start, shape, decoding)


def decode_with(decoding: Decoding) -> Decode:
    """Decode as training does, including prefetched batches."""

    def decode(files: list[Specimen], wanted: list[list[Region]]) -> Iterator[Pixels]:
        contents = [np.frombuffer(file.content, np.uint8) for file in files]

        def source(info: Any) -> tuple[Any, Any, Any]:
            batch = wanted[min(info.iteration, len(wanted) - 1)]
            start = np.array([(region.y, region.x) for region in batch], np.int32)
            shape = np.array([(region.height, region.width) for region in batch], np.int32)
            return [contents[region.specimen] for region in batch], start, shape

        graph = _region_graph(
            source,
            decoding,
            batch_size=max(map(len, wanted)),
            num_threads=cpus_per_process(),
            device_id=_device_id(decoding),
            prefetch_queue_depth=2,
            exec_dynamic=True,
        )
        for batch in wanted:
            (images,) = graph.run()
            images = images.as_cpu()
            yield [np.array(images[index]) for index in range(len(batch))]

    return decode


def _device_id(decoding: Decoding) -> int | None:
    return None if decoding.on == "cpu" else 0


def examine(decode: Decode, *, device: str) -> Measured:
    """Decode all specimens, with the device idle and beside matrix products, and compare.

    Args:
        decode: the decoder under test.
        device: device of the matrix products, "cuda" or "cpu".

    """
    files = specimens()
    every = batches(files, full=FULL_BATCH, count=_FULL_BATCHES)
    singles, full = every[: len(files)], every[len(files) :]
    reference = decode_with(Decoding("cpu"))
    expected = [*reference(files, singles), *reference(files, full)]
    expected_singles, expected_full = expected[: len(files)], expected[len(files) :]
    worst, kinds, count, fault = Difference(0.0, 0.0), dict[str, Difference](), 0, ""
    for beside in ("", ", beside matrix products"):
        often = _BUSY_REPEATS if beside else 1
        with keep_busy(device) if beside else contextlib.nullcontext():
            for wanted, right in ((singles, expected_singles), (full * often, expected_full * often)):
                for batch, found, pixels in zip(wanted, decode(files, wanted), right, strict=True):
                    for region, image, original in zip(batch, found, pixels, strict=True):
                        off = difference(image, original)
                        kind = files[region.specimen].kind
                        worst, kinds[kind] = worst.or_worse(off), kinds.get(kind, off).or_worse(off)
                        count += 1
                        if not fault and not off.is_right:
                            where = f"{_name(files, region)}, in a batch of {len(batch)}{beside}"
                            fault = f"wrong pixels: {where}: {_extent(image, original)}"
    by_kind = {kind: [round(off.mean, 3), round(off.far_share, 5)] for kind, off in kinds.items()}
    return Measured(worst.mean, worst.far_share, count, fault, by_kind)


def _name(files: list[Specimen], region: Region) -> str:
    rows, columns = f"{region.y} to {region.y + region.height}", f"{region.x} to {region.x + region.width}"
    return f"{files[region.specimen].name} (rows {rows}, columns {columns})"


def _extent(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> str:
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} instead of {list(expected.shape)}"
    off = difference(found, expected)
    return (
        f"mean difference {off.mean:.2f}/255 (at most {MOST_MEAN:g}), "
        f"{off.far_share:.2%} of pixels beyond {FAR}/255 (at most {MOST_FAR_SHARE:.0%})"
    )


@contextlib.contextmanager
def keep_busy(device: str) -> Iterator[None]:
    """Run matrix products on a separate stream of a device, from before the block begins until it ends.

    Raises:
        RuntimeError: at the block's end, if the device failed to multiply.

    """
    import torch

    on_gpu = device == "cuda"
    side = _BUSY_SIDE[device]
    factor = torch.full((side, side), 0.01, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(factor)
    begun, stopped = threading.Event(), threading.Event()

    def multiply() -> None:
        with contextlib.ExitStack() as ending:
            ending.callback(begun.set)
            stream: Any = torch.cuda.Stream() if on_gpu else None  # type: ignore[no-untyped-call]
            if stream:
                ending.enter_context(torch.cuda.stream(stream))
            while not stopped.is_set():
                for _ in range(_BUSY_LAUNCHES if stream else 1):
                    torch.mm(factor, factor, out=product)
                if stream:
                    stream.synchronize()
                begun.set()
                if not stream:
                    time.sleep(0.01)  # leave CPU time to the decoder

    with ThreadPoolExecutor(1) as pool:
        products = pool.submit(multiply)
        begun.wait()
        try:
            yield
        finally:
            stopped.set()
        products.result()


def _culprits(decode: Decode) -> str:
    """The kinds of file a decoder fails on; "" if it fails on all or none."""
    files = specimens()
    failed = []
    for index, file in enumerate(files):
        try:
            list(decode(files, [[Region(index, 1, 1, file.height - 1, file.width - 1)]]))
        except RuntimeError:
            failed.append(file.kind)
    return f" (on {', '.join(dict.fromkeys(failed))})" if 0 < len(failed) < len(files) else ""


def serve(decode: Decode, *, device: str, timeout_sec: float) -> None:
    """Examine the decoder and print the result. A timer ends the process after `timeout_sec` seconds."""
    signal.setitimer(signal.ITIMER_REAL, timeout_sec)
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, 0)
    )  # crashes are expected, and a core dump with a GPU's memory map is large
    try:
        found = examine(decode, device=device)._asdict()
    except RuntimeError as error:  # DALI and torch raise this
        print(error, file=sys.stderr, flush=True)
        found = {"fault": f"an error: {reason_of(error)}{_culprits(decode)}"}
    print(f"\n{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    rung = Decoding(sys.argv[1], float(sys.argv[2]))
    serve(decode_with(rung), device="cpu" if rung.on == "cpu" else "cuda", timeout_sec=float(sys.argv[3]))
