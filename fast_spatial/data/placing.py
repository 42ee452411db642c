"""Where a task's stages run: what its options ask for, what the device allows, and what was found to work on it."""

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
    """Where a task's stages run on this process's device; `exact` as `choose_placement` takes it."""
    on_gpu = world.device.type == "cuda"
    found = (world.exact_decoding if exact else None) or world.decoding
    decoding = found.decoding if found else None
    return choose_placement(config.decode, config.warp, on_gpu=on_gpu, exact=exact, decoding=decoding)


def choose_placement(
    decode: str, warp: str, *, on_gpu: bool, exact: bool, decoding: Decoding | None = None
) -> Placement:
    """What --decode and --warp come to.

    Args:
        decode: the option.
        warp: the option.
        on_gpu: whether the views are wanted on a GPU.
        exact: pixels may not depend on load and chance: the GPU's JPEG engine is left alone.
        decoding: the fastest way that was found to work on this GPU; None: nobody looked.

    Raises:
        UserError: naming the option, if this cannot work.

    """
    if warp == "triton":
        _check_triton(on_gpu=on_gpu)
    if warp == "numba" and decode.startswith("gpu"):
        raise UserError(
            "--warp numba: it makes views in host memory, of images that are decoded there",
            f"replace --decode {decode} by --decode cpu, or leave --warp away",
        )
    if not on_gpu and decode.startswith("gpu"):
        raise UserError(
            f"--decode {decode}: no GPU is visible", "launch.py doctor says more; or replace it by --decode cpu"
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
        raise UserError("--warp triton: the package triton is not installed", "install it, or leave --warp away")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("--warp triton: no GPU is visible", "launch.py doctor says more; or leave --warp away")
