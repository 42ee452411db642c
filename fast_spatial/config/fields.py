"""What can be asked for: the modes and every option, as flat frozen dataclasses.

Imports neither torch nor numba, so that help and errors about options are instant. Raw strings from the command line
become typed values here and nowhere else; a bad one is a ValueError that names the flag, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import field
from typing import Any, TypeVar

from fast_spatial.errors import UserError
from fast_spatial.kernels.limits import MAX_SIDE, NOMINAL_SIDE, SpatialLimits

MAX_SEED = 2**31 - 1
# Fields that may change between the parts of one run: where and how it runs, not what it computes.
_NOT_IDENTITY = "not_identity"


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), identity: bool = True) -> Any:
    """A dataclass field that is an option of the command line; `identity` marks what decides a run's numbers."""
    return field(default=default, metadata={"help": help, "choices": choices, _NOT_IDENTITY: not identity})


Config = TypeVar("Config")


def flag(name: str) -> str:
    """A field's flag: global_batch_size is --global-batch-size."""
    return "--" + name.replace("_", "-")


def parse(kind: type[Config], raw: dict[str, str], preset: dict[str, Any] | None = None) -> Config:
    """Build a configuration from raw strings by field name; the preset replaces defaults, never what was given.

    Raises:
        UserError: naming the flag, the value and what is allowed.

    """
    hints = typing.get_type_hints(kind)
    given = {name: _convert(name, text, hints[name]) for name, text in raw.items()}
    return kind(**{**(preset or {}), **given})


def decides_numbers(option: dataclasses.Field[Any]) -> bool:
    """Whether an option decides a run's numbers, so that two parts of one run must agree on it."""
    return not option.metadata.get(_NOT_IDENTITY, False)


def identity(config: Any) -> dict[str, Any]:
    """The fields that decide a run's numbers."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if decides_numbers(f)}


def to_json(config: Any) -> dict[str, Any]:
    """All fields as JSON values."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_json(kind: type[Config], values: dict[str, Any]) -> Config:
    """The inverse of `to_json`; fields this version does not know are left out."""
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _convert(name: str, text: str, hint: Any) -> Any:
    kind = hint
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kind = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)
        parts = [p for p in text.split(",") if p.strip()]
        if of[-1] is not Ellipsis and len(parts) != len(of):
            raise UserError(f"{flag(name)} {text}: expected {len(of)} numbers separated by commas")
        return tuple(_convert(name, part.strip(), of[0]) for part in parts)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{flag(name)} {text}: expected true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"{flag(name)} {text}: expected {what}") from None
        if not math.isfinite(value):
            raise UserError(f"{flag(name)} {text}: expected a finite number")
        return value
    return text


def check_given(config: Any, *names: str) -> None:
    """Raise a UserError if a required option is missing."""
    missing = [flag(name) for name in names if not getattr(config, name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed")


def limits_of(config: Any) -> SpatialLimits:
    """The limits that --degrees and --translate-px mean; raises a UserError if they are out of range."""
    if not 0 <= config.degrees <= 180:
        raise UserError(f"--degrees {config.degrees:g}: rotations reach from 0 to 180 degrees")
    px = config.translate_px
    if px is not None and not 0 <= px <= NOMINAL_SIDE:
        raise UserError(f"--translate-px {px:g}: translations reach from 0 to {NOMINAL_SIDE} pixels")
    return SpatialLimits.from_px(config.degrees, px)


def check_seed(config: Any) -> None:
    """Raise a UserError if --seed is too large."""
    if config.seed > MAX_SEED:
        raise UserError(f"--seed {config.seed}: it must be at most {MAX_SEED}")


def check_side(config: Any) -> None:
    """Raise a UserError if a side is too large."""
    for name in ("side", "eval_side"):
        if getattr(config, name, 0) > MAX_SIDE:
            raise UserError(f"{flag(name)} {getattr(config, name)}: it must be at most {MAX_SIDE}")


def check_choice(config: Any, *names: str) -> None:
    """Raise a UserError if an option is none of its choices."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    for name in names:
        choices = fields[name].metadata["choices"]
        if getattr(config, name) not in choices:
            raise UserError(f"{flag(name)} {getattr(config, name)}: choose one of {', '.join(choices)}")


def check_at_least(config: Any, low: int, *names: str) -> None:
    """Raise a UserError if an option is below its minimum."""
    for name in names:
        if getattr(config, name) < low:
            raise UserError(f"{flag(name)} {getattr(config, name)}: it must be at least {low}")


def show_numbers(values: tuple[Any, ...]) -> str:
    """Numbers as a flag takes them."""
    return ",".join(f"{v:g}" for v in values)
