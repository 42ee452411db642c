"""The Loader: epochs of batches, a pure function of (key, epoch, step), independent of earlier batches.

DALI holds no state that affects the result. The source names the images and random draws of each batch. Each batch
carries its position as a ticket, so the Loader can jump to any step by dropping the batches in flight.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fast_spatial.errors import UserError
from fast_spatial.kernels.crops import Crops
from fast_spatial.kernels.host import cpus_per_process
from fast_spatial.kernels.layout import Header
from fast_spatial.kernels.sampling import Augmentation, Views
from fast_spatial.pipelines.dataset import ImageIndex
from fast_spatial.pipelines.gpu_failures import GpuFailures
from fast_spatial.pipelines.placement import Decoding, Placement, usual_placement
from fast_spatial.pipelines.sampler import BatchSampler
from fast_spatial.pipelines.text import printable

# Length of DALI's queue: the batches that fit into these bytes, clipped to two to four. One of them is in use, so a
# queue of one would load nothing meanwhile.
_QUEUE_BYTES = 1 << 30
_LEAST_QUEUED, _MOST_QUEUED = 2, 4
_READ_AHEAD_BATCHES = 4
# A file is bad only if the CPU cannot decode it: a GPU decoder may fail on good files.
ON_HOST = usual_placement(on_gpu=False)


@dataclass(frozen=True)
class Batch:
    """A batch of B images.

    Attributes:
        made: views, uint8 [B, V, S, S, 3], or the crops from which they are made on demand; on the loader's device.
        labels: int64 [B], on the loader's device.
        index: positions in the split, int64 [B], in host memory.

    """

    made: Tensor | Crops
    labels: Tensor
    index: Tensor

    @cached_property
    def views(self) -> Tensor:
        """Views, uint8 [B, V, S, S, 3]; computed once."""
        return self.made.views() if isinstance(self.made, Crops) else self.made

    @property
    def side(self) -> int:
        """Image size of the views in pixels."""
        return (self.made.images if isinstance(self.made, Crops) else self.made).shape[-2]


class Loader:
    """Batches of views of a split's images.

    Args:
        sampler: which images each batch holds.
        augmentation: crop, flip and colours of the images.
        views: the views of each image.
        side: image size of the views in pixels: a number, or a function of (epoch, step) for progressive resizing. The
            function is also called for batches that are prefetched, even beyond the last epoch.
        largest_side: largest value of that function; it bounds the memory of DALI's queue.
        threads: DALI's CPU threads; default this process's share of the CPUs.
        device: device of the views.
        placement: decoder and warp; default `usual_placement` for the device.
        on_bad_images: called with the images that cannot be decoded, as {position: reason}, and the positions of those
            of which no part can be decoded. If it returns, each is replaced by the next good image of the split. The
            default raises a UserError.
        on_gpu_failure: called with a message when a GPU fails on files that the CPU can decode. The CPU then decodes
            the batch. The default logs a warning.

    Raises:
        ValueError: if images are decoded on a GPU for a loader on the CPU.

    """

    def __init__(
        self,
        sampler: BatchSampler,
        *,
        augmentation: Augmentation,
        views: Views,
        side: int | Callable[[int, int], int],
        largest_side: int = 0,
        threads: int | None = None,
        device: torch.device | None = None,
        placement: Placement | None = None,
        on_bad_images: Callable[[dict[int, str], Collection[int]], None] | None = None,
        on_gpu_failure: Callable[[str], None] | None = None,
    ) -> None:
        self._sampler, self._images = sampler, sampler.images
        self.steps_per_epoch = sampler.steps_per_epoch
        self._views = len(views)
        self._side_at: Callable[[int, int], int] = side if callable(side) else lambda epoch, step: side
        self._device = device or torch.device("cpu")
        on_gpu = self._device.type == "cuda"
        self._device_id = (self._device.index or 0) if on_gpu else None
        self._placement = placement or usual_placement(on_gpu=on_gpu)
        if self._placement.decoding.on != "cpu" and not on_gpu:
            raise ValueError(f"images for {self._device} cannot be decoded on the {self._placement.decoding}")
        self._on_bad_images = on_bad_images or self._refuse
        self._on_gpu_failure = on_gpu_failure or logging.getLogger(__name__).warning
        self._gpu_failures = GpuFailures()
        self._next_ticket = 0
        self._delivered = -1
        self._in_flight: list[int] = []
        # The same for all images, but DALI takes one array per image.
        self._constants = [
            np.repeat(row[None], sampler.batch_size, axis=0) for row in (views.rows(), augmentation.row())
        ]
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="read-ahead")
        self._ahead = self._queue_length(largest_side if callable(side) else side)
        from fast_spatial.pipelines.graph import view_graph  # here, so that `Batch` imports without DALI

        self._build: Callable[..., Any] = partial(
            view_graph,
            views=len(views),
            center=augmentation.center,
            num_threads=threads or cpus_per_process(),
            exec_dynamic=True,
        )
        self._pipeline = self._start()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from a step on."""
        for step in range(start_step, self.steps_per_epoch):
            ticket = epoch * self.steps_per_epoch + step
            if ticket != self._delivered + 1:
                self._next_ticket = ticket  # a jump: batches already in flight are dropped below
            made, header = self._run(ticket)
            labels = header[:, Header.LABEL].contiguous()
            if self._device.type == "cuda":  # from pinned memory: a copy from pageable memory would block
                labels = labels.pin_memory().to(self._device, non_blocking=True)
            yield Batch(made, labels, header[:, Header.INDEX])

    def _run(self, ticket: int) -> tuple[Tensor | Crops, Tensor]:
        """Views or crops, and headers, of one batch; earlier batches in flight are dropped."""
        while True:
            try:
                made, header = self._outputs(self._pipeline)
            except RuntimeError as error:
                self._next_ticket = ticket
                # Free the dead pipeline's memory for the next one. The error's traceback references it, too.
                self._pipeline = None
                traceback.clear_frames(error.__traceback__)
                if self._without_bad_images():
                    continue
                made, header = self._decoded_on_cpu(ticket, error)
            else:
                self._gpu_failures.add_good(header[:, Header.INDEX].numpy())
            self._delivered = int(header[0, Header.TICKET])
            self._in_flight.remove(self._delivered)
            if self._delivered == ticket:
                return made, header

    def _queue_length(self, largest_side: int) -> int:
        assert largest_side > 0
        kept = 1 if self._placement.warp == "triton" else self._views
        batch_bytes = self._sampler.batch_size * kept * largest_side**2 * 3
        return int(np.clip(_QUEUE_BYTES // batch_bytes, _LEAST_QUEUED, _MOST_QUEUED))

    def _start(self) -> Any:
        return self._pipeline_of(self._source, self._sampler.batch_size, self._placement, ahead=self._ahead)

    def _pipeline_of(self, source: Callable[[Any], Any], size: int, placement: Placement, *, ahead: int) -> Any:
        return self._build(
            source,
            batch_size=size,
            placement=placement,
            on_gpu=self._device_id is not None,
            device_id=self._device_id,
            prefetch_queue_depth=ahead,
        )

    def _outputs(self, pipeline: Any) -> tuple[Tensor | Crops, Tensor]:
        if self._device.type == "cuda":
            outputs = pipeline.run(torch.cuda.current_stream(self._device))
        else:
            outputs = pipeline.run()
        # Copied, because DALI may keep the header in pinned memory, which DLPack cannot import.
        header = torch.from_numpy(np.array(outputs[-1].as_tensor()))
        B, side = len(header), int(header[0, Header.SIDE])
        tensors = [self._tensor(output.as_tensor()) for output in outputs[:-1]]
        # An exception inside a numba operator is only printed, and leaves an empty output: check shapes.
        if self._placement.warp == "triton":
            images, matrices, numbers = tensors
            assert images.shape == (B, side, side, 3) and matrices.shape == (B, self._views, 2, 3)
            return Crops(images, matrices, numbers), header
        (views,) = tensors
        assert views.shape == (B, self._views, side, side, 3)
        return views, header

    def _tensor(self, output: Any) -> Tensor:
        """An output of the graph: shared host memory, or a copy in torch's GPU memory, made on the current stream.

        GPU memory is not shared through DLPack: one of DALI's threads would release it after synchronizing the whole
        device. That occupies a CPU and is an error while a CUDA graph is captured. `feed_ndarray` orders the copy
        before DALI's reuse of the memory.
        """
        if self._device.type != "cuda":
            return from_dlpack(output)
        from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

        copy = torch.empty(output.shape(), dtype=to_torch_type[output.dtype], device=self._device)
        feed_ndarray(output, copy, cuda_stream=torch.cuda.current_stream(self._device))
        return copy

    def _decoded_on_cpu(self, ticket: int, error: RuntimeError) -> tuple[Tensor | Crops, Tensor]:
        """Decode on the CPU a batch of good files that the GPU failed on, and start a new pipeline.

        After `gpu_failures.MOST_GPU_FAILURES` failures, the CPU decodes all batches.
        """
        from fast_spatial.pipelines.inspection.decoding import reason_of

        if self._placement.decoding.on == "cpu":
            raise error
        on_cpu = replace(self._placement, decoding=Decoding("cpu"))
        arrays = self._arrays(ticket, on_cpu)
        try:
            made, header = self._outputs(self._pipeline_of(lambda _: arrays, len(arrays[0]), on_cpu, ahead=1))
        except RuntimeError:  # not caused by the GPU decoder
            raise error from None
        what = "the CPU decodes this batch"
        if self._gpu_failures.add_failure(header[:, Header.INDEX].numpy()):
            self._placement = on_cpu
            what = f"this was failure {self._gpu_failures.count}, so the CPU decodes all batches from now on"
        self._on_gpu_failure(f"the GPU failed to decode good files ({reason_of(error)}): {what}")
        self._in_flight[:] = [ticket]
        self._next_ticket = ticket + 1
        self._pipeline = self._start()
        return made, header

    def _without_bad_images(self) -> bool:
        """Find undecodable images in flight; if there are any, start a new pipeline without them and return True.

        DALI's pipeline is dead, and its error names no file. An image is bad if the CPU cannot decode its crop,
        whatever the GPU reports.
        """
        from fast_spatial.pipelines.graph import has_first_pixel
        from fast_spatial.pipelines.inspection.decoding import decode_files

        found: dict[int, list[int]] = {}  # epochs, by position
        for ticket in self._in_flight:
            epoch, positions = self._sampler.batch(ticket)
            for row in self._bad_rows(ticket, range(len(positions))):
                found.setdefault(int(positions[row]), []).append(epoch)
        if not found:
            return False
        images = self._images
        reasons = dict(decode_files([images.path(position) for position in found]))
        bad = {p: reasons[images.path(p)] or "part of it cannot be decoded" for p in found}
        hopeless = [p for p in found if not has_first_pixel(images.paths[p], ON_HOST.decoding, device_id=None)]
        self._on_bad_images(bad, hopeless)
        self._sampler.replace(found, hopeless)
        self._in_flight.clear()
        self._pipeline = self._start()
        return True

    def _bad_rows(self, ticket: int, rows: range) -> list[int]:
        """Rows of a batch that cannot be decoded on the CPU, found by bisection."""
        arrays = tuple(array[rows.start : rows.stop] for array in self._arrays(ticket, ON_HOST))
        on_host = {"placement": ON_HOST, "on_gpu": False, "device_id": None}
        try:
            self._build(lambda _: arrays, batch_size=len(rows), prefetch_queue_depth=1, **on_host).run()
        except RuntimeError:
            middle = (rows.start + rows.stop) // 2
            halves = (range(rows.start, middle), range(middle, rows.stop))
            return [rows.start] if len(rows) == 1 else [row for half in halves for row in self._bad_rows(ticket, half)]
        return []

    def _refuse(self, bad: dict[int, str], _: Collection[int]) -> None:
        raise undecodable(self._images, bad)

    def _source(self, _: Any) -> tuple[NDArray[Any], ...]:
        ticket = self._next_ticket
        self._next_ticket += 1
        self._in_flight.append(ticket)
        self._readers.submit(_read_ahead, self._images.paths, self._sampler.batch(ticket + _READ_AHEAD_BATCHES)[1])
        return self._arrays(ticket, self._placement)

    def _arrays(self, ticket: int, placement: Placement) -> tuple[NDArray[Any], ...]:
        """The graph's inputs for one batch."""
        epoch, positions = self._sampler.batch(ticket)
        side = self._side_at(*divmod(ticket, self.steps_per_epoch))
        headers = np.empty((len(positions), len(Header)), np.int64)
        headers[:, Header.LABEL], headers[:, Header.INDEX] = self._images.labels[positions], positions
        headers[:, Header.KEY], headers[:, Header.EPOCH] = self._sampler.key, epoch
        headers[:, Header.SIDE], headers[:, Header.TICKET] = side, ticket
        canvas = [np.zeros((len(positions), side), np.uint8)] if placement.resizes_on_host else []
        constants = (array[: len(positions)] for array in self._constants)
        return self._images.paths[positions], headers, *constants, *canvas


def undecodable(images: ImageIndex, bad: dict[int, str], otherwise: str = "") -> UserError:
    """The error for images that cannot be decoded, {position: reason}; `otherwise` is appended to the advice."""
    position, reason = next(iter(bad.items()))
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    data = images.root.parent
    return UserError(
        f"{printable(images.path(position))}: {reason}{more}",
        f"find all such files with launch.py check-data --data {data} --write-exclusions FILE, and exclude them with "
        f"--exclude FILE{otherwise}",
    )


def _read_ahead(paths: NDArray[np.uint8], positions: NDArray[np.int64]) -> None:
    """Ask the kernel to prefetch files. Errors are ignored: the later read reports them."""
    for position in positions:
        try:
            descriptor = os.open(paths[position].tobytes().rstrip(b"\0"), os.O_RDONLY)
        except OSError:
            continue
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
