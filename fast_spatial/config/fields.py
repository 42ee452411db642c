"""Options as fields of flat frozen dataclasses: declaration, parsing, checks and JSON.

Imports neither torch nor numba, so that help and errors about options are instant. Raw strings from the command line
become typed values only here. A bad value raises a UserError that names the flag, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, field
from typing import Any, TypeVar

from fast_spatial.errors import UserError

# The headings of a command's help, in order.
SECTIONS = (
    "data",
    "attack",
    "schedule",
    "optimization",
    "augmentation",
    "network",
    "evaluation",
    "output",
    "run",
    "budget",
    "processes",
)
# Old names of fields, with their new names. Users may still type them, and files of older versions contain them.
RENAMED = {
    "side": "image_size",
    "start_side": "start_size",
    "eval_side": "eval_size",
    "score_side": "score_size",
    "score_chunk": "views_per_forward",
    "judge_batch": "views_per_forward",
    "accumulate": "grad_accum_steps",
    "classes": "max_classes",
    "budget": "max_cost",
    "bn_group": "bn_group_size",
}
_METAVARS = {"int": "N", "float": "X", "bool": "true|false"}


def option(
    default: Any,
    help: str,
    *,
    section: str,
    metavar: str = "",
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    required: bool = False,
    identity: bool = True,
) -> Any:
    """A dataclass field that is an option of the command line.

    Args:
        default: the value without the flag.
        help: a noun phrase.
        section: one of `SECTIONS`.
        metavar: placeholder of the value in the help.
        choices: the allowed values; empty: any.
        minimum: the smallest allowed value.
        required: whether an empty value is refused.
        identity: whether it changes a run's numbers. All parts of one run must then agree on it.

    """
    assert section in SECTIONS
    about = {"help": help, "section": section, "metavar": metavar, "choices": choices, "minimum": minimum}
    return field(default=default, metadata={**about, "required": required, "identity": identity})


Config = TypeVar("Config")


def flag(name: str) -> str:
    """A field's flag: global_batch_size is --global-batch-size."""
    return "--" + name.replace("_", "-")


def is_switch(option: Field[Any]) -> bool:
    """Whether an option is true or false."""
    return option.type in (bool, "bool")


def is_several(option: Field[Any]) -> bool:
    """Whether an option holds several values."""
    return str(option.type).startswith("tuple")


def metavar_of(option: Field[Any]) -> str:
    """Placeholder of an option's value in the help: its choices, or a word."""
    kind = str(option.type).removesuffix(" | None")
    return "|".join(option.metadata["choices"]) or option.metadata["metavar"] or _METAVARS.get(kind, "TEXT")


def as_typed(value: Any) -> str:
    """A value in the syntax of the command line; empty for None."""
    if isinstance(value, tuple):
        return ",".join(map(as_typed, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value).removesuffix(".0")


def parse(kind: type[Config], raw: dict[str, str], preset: dict[str, Any] | None = None) -> Config:
    """Build a configuration from raw strings by field name. Raw strings override `preset`, which overrides defaults.

    Raises:
        UserError: naming the flag, the value and what is allowed.

    """
    hints = typing.get_type_hints(kind)
    given = {name: convert(name, text, hints[name]) for name, text in raw.items()}
    return kind(**{**(preset or {}), **given})


def decides_numbers(option: Field[Any]) -> bool:
    """Whether an option changes a run's numbers. All parts of one run must then agree on it."""
    return bool(option.metadata.get("identity", True))


def identity(config: Any) -> dict[str, Any]:
    """The fields that change a run's numbers, as JSON values."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if decides_numbers(f)}


def to_json(config: Any) -> dict[str, Any]:
    """All fields as JSON values."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def todays_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, with the field names of older versions renamed to today's."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


def from_json(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `to_json`, for this version and older ones. Unknown fields are ignored."""
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given = todays_names(values).items()
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in given if name in known})


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The values that differ, by the names in `given`: "lr: 0.1 saved, 0.2 given"; "" if all agree."""
    found = [name for name in given if saved.get(name) != given[name]]
    return "; ".join(f"{name}: {_shown(saved.get(name))} saved, {_shown(given[name])} given" for name in found)


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def convert(name: str, text: str, hint: Any) -> Any:
    """A field's value from text.

    Raises:
        UserError: naming the flag, the text and what is expected.

    """
    kind = hint
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kind = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)
        parts = [p for p in text.split(",") if p.strip()]
        if of[-1] is not Ellipsis and len(parts) != len(of):
            raise UserError(f"{flag(name)} {text}: expected {len(of)} numbers separated by commas")
        return tuple(convert(name, part.strip(), of[0]) for part in parts)
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


def check_fields(config: Any) -> None:
    """Check every option against its declaration: required, choices and minimum.

    Raises:
        UserError: naming the first invalid option.

    """
    options = dataclasses.fields(config)
    missing = [flag(f.name) for f in options if f.metadata.get("required") and not getattr(config, f.name)]
    if missing:
        raise UserError(f"missing required flag{'s' * (len(missing) > 1)}: {', '.join(missing)}")
    for option in options:
        value, choices, least = (getattr(config, option.name), *map(option.metadata.get, ("choices", "minimum")))
        if choices and value not in choices:
            raise UserError(f"{flag(option.name)} {value}: choose one of {', '.join(choices)}")
        if least is not None and value is not None and value < least:
            raise UserError(f"{flag(option.name)} {as_typed(value)}: must be at least {as_typed(least)}")
