"""Rates of a device on synthetic views in its memory, with their ceilings, by image size and batch size.

The ceilings are measured, too: a fill and a copy for memory bandwidth, a large matrix product for arithmetic. The code
also runs on a CPU, with the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1), to find errors without a GPU.
B images, V views of each, S image size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.groups.step import make_step
from benchmarks.jobs import Job
from benchmarks.jpegs import photograph
from benchmarks.on_gpu.record import Record
from fast_spatial.config.commands import BenchConfig
from fast_spatial.evaluation.attack import GridSurvivors
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import BatchedForward
from fast_spatial.evaluation.fused import ConvReLU, MaxPool, Zeros, blocks_of, kernel_of_blocks
from fast_spatial.kernels.host import usable_cpus
from fast_spatial.kernels.layout import Colour
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.spatial import matrices
from fast_spatial.models import classifier
from fast_spatial.models.classifier import Classifier
from fast_spatial.pipelines.loader import Batch
from fast_spatial.runtime.device import dtype_of, exact_float32, synchronized_time

CANDIDATES = 11
LIMITS = SpatialLimits.from_px(30)
# Shapes of ResNet-18's convolutions: channels in and out, kernel, stride, input size at 224 px.
CONVOLUTIONS = (
    (3, 64, 7, 2, 224),
    (64, 64, 3, 1, 56),
    (64, 128, 3, 2, 56),
    (128, 128, 3, 1, 28),
    (256, 256, 3, 1, 14),
    (512, 512, 3, 1, 7),
)


@dataclass(frozen=True)
class Sizes:
    """Sizes and durations of the measurements.

    Attributes:
        side: image size of the views in pixels.
        small_side: a smaller image size for scoring, in pixels.
        standard: batch sizes of standard training.
        worst10: batch sizes of worst10 training.
        score: views per forward pass of scoring.
        score_small: views per forward pass at the smaller size.
        matmul: size of the square matrices of the arithmetic ceiling.
        elements: elements filled and copied for the bandwidth ceiling.
        crops: images per batch of the warp, each with `CANDIDATES` views.
        convolved: images per batch of a convolution.
        grid: images attacked on the grid.
        grid_pass: views per forward pass of the grid attack.
        seconds: least duration of a round.
        rounds: number of rounds; the median is reported.

    """

    side: int
    small_side: int
    standard: tuple[int, ...]
    worst10: tuple[int, ...]
    score: tuple[int, ...]
    score_small: int
    matmul: int
    elements: int
    crops: int
    convolved: int
    grid: int
    grid_pass: int
    seconds: float
    rounds: int


GPU = Sizes(
    side=224,
    small_side=160,
    standard=(256, 1024),
    worst10=(256, 64),
    score=(1408, 704),
    score_small=1408,
    matmul=8192,
    elements=1 << 30,
    crops=256,
    convolved=1408,
    grid=32,
    grid_pass=1024,
    seconds=0.2,
    rounds=5,
)
DRY = Sizes(
    side=32,
    small_side=16,
    standard=(4, 8),
    worst10=(4, 2),
    score=(22, 11),
    score_small=22,
    matmul=128,
    elements=1 << 12,
    crops=2,
    convolved=2,
    grid=1,
    grid_pass=64,
    seconds=0.001,
    rounds=1,
)


@dataclass(frozen=True)
class Bench:
    """The device, sizes and record of measurements; `side` is the image size in pixels."""

    record: Record
    device: torch.device
    sizes: Sizes
    side: int

    @property
    def job(self) -> Job:
        """The argument of `make_step`."""
        return Job(BenchConfig(image_size=self.side), self.device, usable_cpus())

    def seconds(self, work: Callable[[], object]) -> float:
        """Median seconds per call, over rounds of at least `sizes.seconds` each."""

        def spent(calls: int) -> float:
            start = synchronized_time(self.device)
            for _ in range(calls):
                work()
            return synchronized_time(self.device) - start

        for _ in range(2):
            spent(1)
        calls = max(1, math.ceil(self.sizes.seconds / max(spent(1), 1e-7)))
        return statistics.median(spent(calls) / calls for _ in range(self.sizes.rounds))

    def random_views(self, count: int, views: int, side: int) -> torch.Tensor:
        """Random views, uint8 [count, views, side, side, 3]."""
        return torch.randint(0, 256, (count, views, side, side, 3), dtype=torch.uint8, device=self.device)


def ceilings(bench: Bench) -> None:
    """Measure bytes per second of a fill and a copy, and operations per second of matrix products."""
    size = bench.sizes.elements

    def fill() -> dict[str, Any]:
        target = torch.empty(size, dtype=torch.bfloat16, device=bench.device)
        return {"written_gb_per_sec": round(target.nbytes / bench.seconds(lambda: target.fill_(1.0)) / 1e9, 1)}

    def copy() -> dict[str, Any]:
        source, target = (torch.zeros(size, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
        spent = bench.seconds(lambda: target.copy_(source))
        return {"read_and_written_gb_per_sec": round(2 * target.nbytes / spent / 1e9, 1)}

    bench.record.measure("fill", fill)
    bench.record.measure("copy", copy)
    for name in ("bfloat16", "tf32", "float32"):
        bench.record.measure(f"matmul_{name}", partial(_matmul, bench, name))


def _matmul(bench: Bench, dtype_name: str) -> dict[str, Any]:
    return {"tflops": round(peak_flops(bench, dtype_name) / 1e12, 2)}


def peak_flops(bench: Bench, dtype_name: str = "auto") -> float:
    """Floating-point operations per second of a large matrix product."""
    dtype, size = dtype_of(dtype_name, bench.device), bench.sizes.matmul
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / bench.seconds(lambda: a @ b)


@cache
def flops(side: int, *, training: bool) -> float:
    """Floating-point operations of ResNet-18 per view: forward, or forward and backward."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        logits = classifier.build("resnet18", 1000)(
            torch.empty(2, 3, side, side)
        )  # batch of two: BatchNorm rejects one value per channel
        if training:
            logits.sum().backward()
    return float(counter.get_total_flops()) / 2


def train(bench: Bench, side: int, batch: int, *, views: int, compiled: bool, peak: float) -> dict[str, Any]:
    """Training steps on views in memory: one view per image, or the worst of several."""
    step = make_step(bench.job, scored=views > 1, compiled=compiled)
    candidates = bench.random_views(batch, views, side)
    labels = torch.randint(0, 1000, (batch,), device=bench.device)
    index = torch.arange(batch)
    losses: list[torch.Tensor] = []
    spent = bench.seconds(lambda: losses.append(step(Batch(candidates, labels, index)).loss.mean()))
    work = flops(side, training=True) + (views * flops(side, training=False) if views > 1 else 0)
    first, last = losses[0].item(), losses[-1].item()
    if not math.isfinite(last):
        raise RuntimeError(f"the loss became {last}")
    return {
        "images_per_sec": round(batch / spent, 1),
        "ms": round(1000 * spent, 2),
        "flop_utilization_pct": round(100 * batch * work / spent / peak, 1),
        "ceiling_images_per_sec": round(peak / work),
        "loss_first": round(first, 3),
        "loss_last": round(last, 3),
    }


def score(bench: Bench, side: int, batch: int, *, peak: float) -> dict[str, Any]:
    """One forward pass of the evaluation network over views in memory, including normalization."""
    torch.manual_seed(0)
    dtype = dtype_of("auto", bench.device)
    model = Classifier(classifier.build("resnet18", 1000)).to(bench.device)
    scorer = FoldedJudge(model, dtype)
    passes = BatchedForward(scorer, batch, pad=True)
    views = bench.random_views(batch, 1, side)
    # Compared with a pass over the last views alone: in the large batch, these have the largest memory offsets.
    logits, last = passes(views)[:, 0], min(batch, 64)
    expected = BatchedForward(FoldedJudge(model, dtype), last)(views[-last:])[:, 0]
    error = ((logits[-last:] - expected).abs().max() / expected.abs().max()).item()
    if not error < 0.05:
        raise RuntimeError(f"wrong logits: they differ by {error:.3g} of the largest logit")
    spent = bench.seconds(lambda: passes(views))
    work = flops(side, training=False)
    return {
        "views_per_sec": round(batch / spent, 1),
        "ms": round(1000 * spent, 2),
        "views_per_pass": passes.size,
        "flop_utilization_pct": round(100 * batch * work / spent / peak, 1),
        "ceiling_views_per_sec": round(peak / work),
        "relative_error": round(error, 5),
    }


def networks(bench: Bench, *, compiled: bool) -> None:
    """Training and scoring, the most informative first. Scoring in half precision is never compiled."""
    peak, sizes = peak_flops(bench), bench.sizes
    ending = "_compiled" if compiled else ""

    def trained(batch: int, views: int) -> None:
        name = f"train_{'standard' if views == 1 else 'worst10'}_{bench.side}px_batch_{batch}{ending}"
        work = partial(train, bench, bench.side, batch, views=views, compiled=compiled, peak=peak)
        bench.record.measure(name, work)

    def scored(side: int, batch: int) -> None:
        bench.record.measure(f"score_{side}px_batch_{batch}", partial(score, bench, side, batch, peak=peak))

    trained(sizes.standard[0], 1)
    trained(sizes.worst10[0], CANDIDATES)
    if compiled:
        return
    scored(bench.side, sizes.score[0])
    scored(sizes.small_side, sizes.score_small)
    scored(bench.side, sizes.score[1])
    trained(sizes.worst10[1], CANDIDATES)
    trained(sizes.standard[1], 1)


def fused_convolutions(bench: Bench) -> None:
    """Convolution, bias and ReLU as one cuDNN kernel, compared with separate kernels: error and speed."""
    for channels, out_channels, kernel, stride, side in CONVOLUTIONS:
        name = f"conv_relu_{channels}_{out_channels}_{kernel}x{kernel}_{side}px"
        here = max(2, side * bench.side // 224)
        bench.record.measure(name, partial(_fused, bench, channels, out_channels, kernel, stride, here))


def rewritten(bench: Bench) -> None:
    """Other optimizations of the evaluation network: its stem by pixel blocks, max pooling without indices."""
    bench.record.measure("stem_by_blocks", partial(_stem, bench))
    bench.record.measure("max_pool_without_indices", partial(_pool, bench))


def _stem(bench: Bench) -> dict[str, Any]:
    channels, out_channels, kernel, stride, _ = CONVOLUTIONS[0]
    dtype, device = dtype_of("auto", bench.device), bench.device
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2).to(device)
    weight = kernel_of_blocks(conv.weight.detach())
    by_blocks = torch.nn.Conv2d(weight.shape[1], out_channels, weight.shape[2]).to(device)
    by_blocks.load_state_dict({"weight": weight, "bias": conv.bias})
    x = torch.randn(bench.sizes.convolved, channels, bench.side, bench.side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    with exact_float32(True):
        exact = conv(x[:4].float()).relu_().detach()
    zeros = Zeros()
    plain, fused = (
        ConvReLU(conv.to(dtype).to(memory_format=torch.channels_last), zeros)  # type: ignore[call-overload]
        for conv in (conv, by_blocks)
    )
    return _compared(bench, partial(plain, x), lambda: fused(blocks_of(x, kernel)), exact)


def _pool(bench: Bench) -> dict[str, Any]:
    channels, side, dtype = CONVOLUTIONS[0][1], bench.side // 2, dtype_of("auto", bench.device)
    x = torch.randn(bench.sizes.convolved, channels, side, side, device=bench.device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    pool = torch.nn.MaxPool2d(3, 2, 1)
    return _compared(bench, partial(pool, x), partial(MaxPool(pool), x), pool(x[:4]).float())


def _fused(bench: Bench, channels: int, out_channels: int, kernel: int, stride: int, side: int) -> dict[str, Any]:
    dtype, device = dtype_of("auto", bench.device), bench.device
    torch.manual_seed(0)
    x = torch.randn(bench.sizes.convolved, channels, side, side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2).to(device)
    with exact_float32(True):
        exact = conv(x[:4].float()).relu_().detach()
    conv.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _compared(bench, lambda: conv(x).relu_(), partial(ConvReLU(conv, Zeros()), x), exact)


@torch.inference_mode()
def _compared(
    bench: Bench, plain: Callable[[], torch.Tensor], fused: Callable[[], torch.Tensor], exact: torch.Tensor
) -> dict[str, Any]:
    """Times of two implementations, and their errors on the first four images, relative to float32."""
    errors = [((work()[:4].float() - exact).abs().max() / exact.abs().max()).item() for work in (plain, fused)]
    if not errors[1] < 2 * errors[0] + 0.01:
        raise RuntimeError(f"wrong result: error {errors[1]:.3g} of the largest value; unfused {errors[0]:.3g}")
    spent = [bench.seconds(work) for work in (plain, fused)]
    return {
        "plain_ms": round(1000 * spent[0], 3),
        "fused_ms": round(1000 * spent[1], 3),
        "times_faster": round(spent[0] / spent[1], 2),
        "plain_relative_error": round(errors[0], 5),
        "fused_relative_error": round(errors[1], 5),
    }


def pictures(count: int, side: int) -> torch.Tensor:
    """Synthetic photographs, uint8 [count, side, side, 3]."""
    made = [np.asarray(Image.fromarray(photograph(seed)).resize((side, side))) for seed in range(min(count, 16))]
    return torch.from_numpy(np.stack([made[n % len(made)] for n in range(count)]))


def drawn_matrices(count: int, views: int, side: int) -> torch.Tensor:
    """Random warps within the published limits, float32 [count, views, 2, 3]."""
    params = np.random.default_rng(0).uniform(-1, 1, (count, views, 3))
    params *= (LIMITS.degrees, LIMITS.translate, LIMITS.translate)
    return torch.from_numpy(matrices(params, side))


def warps(bench: Bench) -> None:
    """The Triton kernels, compared with a fill of the same tensor."""
    B, V, S, device = bench.sizes.crops, CANDIDATES, bench.side, bench.device
    dtype = dtype_of("auto", device)
    images, rows = pictures(B, S).to(device), drawn_matrices(B, V, S).to(device)
    model = Classifier(torch.nn.Identity()).to(device)
    views = bench.random_views(B * V, 1, S)[:, 0]

    def kernel(work: Callable[[], torch.Tensor]) -> dict[str, Any]:
        target = work()
        spent, fill = bench.seconds(work), bench.seconds(lambda: target.fill_(1.0))
        return {
            "ms": round(1000 * spent, 3),
            "views_per_sec": round(B * V / spent),
            "written_gb_per_sec": round(target.nbytes / spent / 1e9, 1),
            "fill_gb_per_sec": round(target.nbytes / fill / 1e9, 1),
            "share_of_fill_pct": round(100 * fill / spent, 1),
        }

    def warp() -> dict[str, Any]:
        from fast_spatial.kernels import warp_cuda

        return kernel(lambda: warp_cuda.warp_normalized(images, rows, None, model.scale, model.shift, dtype))

    def normalize() -> dict[str, Any]:
        from fast_spatial.kernels import warp_cuda

        return kernel(lambda: warp_cuda.normalize(views, model.scale, model.shift, dtype))

    bench.record.measure("triton_warp", warp)
    bench.record.measure("triton_normalize", normalize)


def dali_views(bench: Bench) -> None:
    """Colours, mean and warps by DALI's operators, on crops in the device's memory."""
    bench.record.measure("dali_views", partial(_dali_views, bench), needs="nvidia.dali")


def _dali_views(bench: Bench) -> dict[str, Any]:
    from nvidia.dali import fn, pipeline_def

    from fast_spatial.pipelines.ops import dali_views

    on_gpu = bench.device.type == "cuda"
    images = pictures(bench.sizes.crops, bench.side)
    crops: Any = images.to(bench.device) if on_gpu else images.numpy()
    rows = drawn_matrices(len(images), CANDIDATES, bench.side).numpy()
    colours = np.ones((len(images), len(Colour)), np.float32)

    def seconds(with_views: bool) -> float:
        @pipeline_def
        def graph() -> Any:
            fed = fn.external_source(lambda: crops, batch=True, layout="HWC", device="gpu" if on_gpu else "cpu")
            matrices_V23 = fn.external_source(lambda: rows, batch=True)
            colour = fn.external_source(lambda: colours, batch=True)
            return dali_views(fed, matrices_V23, colour, CANDIDATES) if with_views else (fed, matrices_V23, colour)

        built = graph(
            batch_size=len(rows),
            num_threads=usable_cpus(),
            device_id=0 if on_gpu else None,
            prefetch_queue_depth=2,
            exec_dynamic=True,
        )
        return bench.seconds(built.run)

    fed, whole = seconds(False), seconds(True)
    return {
        "ms": round(1000 * (whole - fed), 3),
        "feeding_ms": round(1000 * fed, 3),
        "views": rows.shape[0] * rows.shape[1],
        "views_per_sec": round(rows.shape[0] * rows.shape[1] / whole),
    }


def grid_attack(bench: Bench, dtype_names: Sequence[str] = ("bfloat16", "tf32", "float32")) -> None:
    """Views per second of the exhaustive attack. Labels are the network's predictions, so that images survive."""
    for name in dtype_names:
        bench.record.measure(f"grid_{name}_{bench.side}px", partial(_grid, bench, name))


def _grid(bench: Bench, dtype_name: str) -> dict[str, Any]:
    dtype = dtype_of(dtype_name, bench.device)
    torch.manual_seed(0)
    model = Classifier(classifier.build("resnet18", 1000)).to(bench.device)
    images = pictures(bench.sizes.grid, bench.side).to(bench.device)
    with exact_float32(dtype_name == "float32"):
        passes = BatchedForward(FoldedJudge(model, dtype), bench.sizes.grid_pass, pad=True)
        labels = passes(images[:, None])[:, 0].argmax(dim=1).tolist()
        rates = []
        for _ in range(1 + min(bench.sizes.rounds, 3)):  # the first one is a warm-up
            pool = GridSurvivors(passes, LIMITS, bench.side)
            start = synchronized_time(bench.device)
            pool.add(images, labels, list(range(len(images))))
            while pool.pending:
                pool.turn()
            spent = synchronized_time(bench.device) - start
            verdicts = pool.take_verdicts()
            rates.append(sum(verdict.views_judged for verdict in verdicts) / spent)
    work = flops(bench.side, training=False)
    return {
        "views_per_sec": round(statistics.median(rates[1:]), 1),
        "views_per_pass": passes.size,
        "images": len(images),
        "survivors": sum(verdict.survived for verdict in verdicts),
        "ceiling_views_per_sec": round(peak_flops(bench, dtype_name) / work),
    }
