"""Where each stage of the data path runs, as data: who decodes the JPEG files, and who makes the views."""

from __future__ import annotations

from dataclasses import dataclass

DECODERS = ("gpu", "gpu-full", "cpu")
WARPS = ("dali", "triton", "numba")
# Share of a batch that the GPU's JPEG engine decodes, where it may.
HW_DECODER_LOAD = 0.65


@dataclass(frozen=True)
class Decoding:
    """How JPEG files become pixels.

    Attributes:
        on: "gpu" decodes the drawn region on the GPU, "gpu-full" the whole image and crops it there, "cpu" the drawn
            region on the CPU.
        hw_decoder_load: share of a batch for the GPU's JPEG engine; 0 leaves it alone.

    """

    on: str
    hw_decoder_load: float = 0.0

    def __str__(self) -> str:
        if self.on == "cpu":
            return "CPU"
        what = "regions" if self.on == "gpu" else "whole images"
        engine = f"{self.hw_decoder_load:.0%} by the JPEG engine" if self.hw_decoder_load else "without the JPEG engine"
        return f"GPU, {what}, {engine}"


# From the fastest to the one that always works.
RUNGS = (Decoding("gpu", HW_DECODER_LOAD), Decoding("gpu"), Decoding("gpu-full"), Decoding("cpu"))


@dataclass(frozen=True)
class Placement:
    """Decoding, and who makes the views of a decoded image.

    Attributes:
        decoding: how files are decoded.
        warp: "dali": DALI's operators inside the graph, on the loader's device; "triton": our Triton kernels, from the
            crop that the graph ends in, on the stream that takes the batch; "numba": our CPU kernels inside the graph.

    Raises:
        ValueError: if the views would be made on CPUs of images in GPU memory.

    """

    decoding: Decoding
    warp: str

    def __post_init__(self) -> None:
        if self.warp == "numba" and self.decoding.on != "cpu":
            raise ValueError(f"numba makes views in host memory, but images are decoded on the {self.decoding}")

    @property
    def resizes_on_host(self) -> bool:
        """Whether our own CPU kernel resizes, which has to be told the side: an array of that length."""
        return self.decoding.on == "cpu" and self.warp != "dali"


def usual_placement(*, on_gpu: bool) -> Placement:
    """Where everything runs if nothing else is said, without what depends on load (the JPEG engine)."""
    return Placement(Decoding("gpu"), "dali") if on_gpu else Placement(Decoding("cpu"), "numba")
