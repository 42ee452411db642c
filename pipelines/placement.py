"""Where each stage of the data path runs, as data: the JPEG decoder and the warp."""

from __future__ import annotations

from dataclasses import dataclass

DECODERS = ("gpu", "gpu-full", "cpu")
WARPS = ("dali", "triton", "numba")
# Default share of a batch for the GPU's JPEG engine.
HW_DECODER_LOAD = 0.65


@dataclass(frozen=True)
class Decoding:
    """How JPEG files become pixels.

    Attributes:
        on: "gpu" decodes only the crop, on the GPU. "gpu-full" decodes the whole image and crops it, on the GPU. "cpu"
            decodes only the crop, on the CPU.
        hw_decoder_load: share of a batch for the GPU's JPEG engine; 0 does not use it.

    """

    on: str
    hw_decoder_load: float = 0.0

    def __str__(self) -> str:
        if self.on == "cpu":
            return "CPU"
        what = "regions" if self.on == "gpu" else "whole images"
        engine = f"{self.hw_decoder_load:.0%} by the JPEG engine" if self.hw_decoder_load else "without the JPEG engine"
        return f"GPU, {what}, {engine}"


# From the fastest to the one that works on every machine.
RUNGS = (Decoding("gpu", HW_DECODER_LOAD), Decoding("gpu"), Decoding("gpu-full"), Decoding("cpu"))


@dataclass(frozen=True)
class Placement:
    """Decoder and warp of the data path.

    Attributes:
        decoding: the decoder of the files.
        warp: "dali" uses DALI's operators inside the graph, on the loader's device. "triton" uses our Triton kernels on
            the graph's crops, on the CUDA stream of the consumer. "numba" uses our CPU kernels inside the graph.

    Raises:
        ValueError: if warp is "numba" and images are decoded into GPU memory.

    """

    decoding: Decoding
    warp: str

    def __post_init__(self) -> None:
        if self.warp == "numba" and self.decoding.on != "cpu":
            raise ValueError(f"warp numba needs images in host memory, but decoding is on the {self.decoding}")

    @property
    def resizes_on_host(self) -> bool:
        """Whether our own CPU kernel resizes; it needs the image size as an extra input, the canvas."""
        return self.decoding.on == "cpu" and self.warp != "dali"


def usual_placement(*, on_gpu: bool) -> Placement:
    """The default placement, without the JPEG engine, whose use depends on load."""
    return Placement(Decoding("gpu"), "dali") if on_gpu else Placement(Decoding("cpu"), "numba")
