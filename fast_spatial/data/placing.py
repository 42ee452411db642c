"""Placement of decoding and warping, from the options, the device, and the decoding that was probed on it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import TYPE_CHECKING

from fast_spatial.config.train import LaunchOptions
from fast_spatial.errors import UserError
from fast_spatial.pipelines.placement import RUNGS, Decoding, Placement

if TYPE_CHECKING:
    from fast_spatial.runtime.distributed import World


def placement_of(config: LaunchOptions, world: World, *, exact: bool) -> Placement:
    """The placement of a task's stages on this process's device; `exact` as in `choose_placement`."""
    on_gpu = world.device.type == "cuda"
    found = (world.exact_decoding if exact else None) or world.decoding
    decoding = found.decoding if found else None
    return choose_placement(config.decode, config.warp, on_gpu=on_gpu, exact=exact, decoding=decoding)


def choose_placement(
    decode: str, warp: str, *, on_gpu: bool, exact: bool, decoding: Decoding | None = None
) -> Placement:
    """The placement for --decode and --warp.

    Args:
        decode: value of --decode.
        warp: value of --warp.
        on_gpu: whether the views are needed on a GPU.
        exact: pixels must not depend on load or chance, so the GPU's JPEG engine is not used.
        decoding: fastest decoding that works on this GPU; None: not probed.

    Raises:
        UserError: naming the option, if the combination cannot work.

    """
    if warp == "triton":
        _check_triton(on_gpu=on_gpu)
    if warp == "numba" and decode.startswith("gpu"):
        raise UserError(
            f"--warp numba: warps on the CPU and needs images decoded there, but --decode is {decode}",
            "use --decode cpu, or remove --warp",
        )
    if not on_gpu and decode.startswith("gpu"):
        raise UserError(
            f"--decode {decode}: no GPU is visible", "use --decode cpu, or look for the cause with launch.py doctor"
        )
    if decode == "cpu" or warp == "numba" or not on_gpu:
        chosen = Decoding("cpu")
    elif decoding is not None and decode in ("auto", decoding.on):
        chosen = decoding
    else:
        chosen = next(rung for rung in RUNGS if decode in ("auto", rung.on))
    if exact:
        chosen = dataclasses.replace(chosen, hw_decoder_load=0.0)
    return Placement(chosen, {"auto": "dali" if on_gpu else "numba"}.get(warp, warp))


def _check_triton(*, on_gpu: bool) -> None:
    if importlib.util.find_spec("triton") is None:
        raise UserError("--warp triton: the package triton is not installed", "install it, or remove --warp")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            "--warp triton: no GPU is visible", "remove --warp, or look for the cause with launch.py doctor"
        )
