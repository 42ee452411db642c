"""Deviations from the recipe of the published table: by options, and built in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fast_spatial.config.fields import flag, identity
from fast_spatial.config.train import TrainConfig

# (ours, the reference, why and how much), as in docs/deviations.md.
BUILT_IN = (
    (
        "BatchNorm over each process's batch (or its parts, with `--grad-accum-steps`)",
        "32 images (8 GPUs), replica 0's statistics",
        "speed; `--bn-group-size 32` normalizes as the reference, and averages the running statistics of each "
        "process's first group",
    ),
    ("the remainder of an epoch is dropped", "trained on", "143 of 1,281,167 images"),
    ("views are rounded to 8 bits", "float", "at most 0.53/255 from the exact warp"),
    ("on CPUs, crops are resized rows first, then columns", "PIL: columns first", "at most 1/255"),
    (
        "colours are rounded and clipped once",
        "truncated and clipped after each step, in random order (which changes nothing else)",
        "one matrix per image; 1.2 to 1.5/255 brighter on average, 3/255 at most",
    ),
    (
        "the grid demands all 775 views right",
        "takes the first wrong view, then keeps the untouched image if its loss is higher",
        "strict",
    ),
    (
        "`best.pt` is chosen by one pass of the training attack with fixed draws",
        "by an attack drawn anew",
        "comparable epochs",
    ),
    (
        "in bfloat16 on CPUs, maps narrower than a convolution's stride get columns of zeros on the right",
        "none",
        "oneDNN 3.12 on AVX-512 fills the gradient of weights that meet only padding from leftover memory (68 of 100 "
        "gradients wrong in plain torch, 0 in float32); the output is the same",
    ),
    ("the worst view is judged by the folded twin", "by the model itself", "folding is exact up to rounding"),
)
# Options that define a row of the table; they are not deviations.
_OF_ROWS = ("mode", "degrees", "translate_px", "seed")
_IN_WORDS: dict[str, dict[Any, str]] = {
    "max_classes": {0: "all"},
    "max_train_images": {0: "all"},
    "bn_group_size": {0: "each process's batch"},
    "score_size": {0: "the views' own"},
    "dtype": {"auto": "auto: half precision where the hardware has it"},
}


def options(
    configs: Mapping[str, TrainConfig], epochs: Mapping[str, float] | None = None
) -> list[tuple[str, str, str]]:
    """(flag, the reference's value, other values with their rows) of the options that change a run's numbers.

    Args:
        configs: configurations by the name of the row.
        epochs: trained epochs by the name of the row; by default the recipe's.

    """
    reference = {**identity(TrainConfig(data="-", out="-", mode="standard")), "dtype": "float32"}
    used = {
        name: {**identity(config), "dtype": config.dtype, "epochs": (epochs or {}).get(name, config.epochs)}
        for name, config in configs.items()
    }
    found = []
    for name, value in reference.items():
        if name in _OF_ROWS:
            continue
        by_value: dict[str, list[str]] = {}
        for row, values in used.items():
            by_value.setdefault(_shown(name, values[name]), []).append(row)
        if list(by_value) == [_shown(name, value)]:
            continue
        ours = [text if len(rows) == len(used) else f"{text} ({'; '.join(rows)})" for text, rows in by_value.items()]
        found.append((flag(name), _shown(name, value), "; ".join(ours)))
    return found


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(_shown(name, one) for one in value)
    if value in _IN_WORDS.get(name, {}):
        return _IN_WORDS[name][value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
