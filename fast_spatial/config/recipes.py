"""Recipes: values of training options in a small TOML file. `launch.py recipes` lists the built-in ones.

A recipe replaces defaults, and flags override it. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fast_spatial.config.fields import RENAMED, as_typed, flag, identity, parse, todays_names
from fast_spatial.config.modes import DIGITS
from fast_spatial.config.train import BUDGETS, TrainConfig
from fast_spatial.errors import UserError

FOLDER = Path(__file__).parent / "recipes"
REFERENCE, FAST = "reference", "fast"
# Former recipes that differed only in their epochs; now --recipe fast --epochs N.
_LADDER = re.compile(r"e(16|24|32|40|56|88)")
_RECIPE_WORDS = re.compile(rf"--recipe[ =]{_LADDER.pattern}(?!\S)")
_FLAG = re.compile(r"(?<!\S)--([a-z][\w-]*)(?![^\s=])")
_ANY = TrainConfig(data="data", out="out", mode="standard")
# A recipe may hold all options that change a run's numbers, except the run's subject; and the interval of evaluations.
_OF_A_RUN = {"mode", "degrees", "translate_px", "seed", "max_classes", "max_train_images"}
_KEYS = (identity(_ANY).keys() - _OF_A_RUN) | {"eval_every"}
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text in quotes"}


@dataclasses.dataclass(frozen=True)
class PublishedRun:
    """A result of another project: top-1 accuracy on ImageNet in percent, and minutes on one A100."""

    top1_pct: float
    minutes: float


# Standard training in the style of `fast`, by epochs. The conditions differ from ours, so this is orientation only.
PUBLISHED_LADDER = {
    16: PublishedRun(66.9, 35.0),
    24: PublishedRun(68.8, 51.6),
    32: PublishedRun(70.0, 68.9),
    40: PublishedRun(70.6, 85.5),
    56: PublishedRun(71.3, 119.4),
    88: PublishedRun(72.4, 187.3),
}
PUBLISHED_CONDITIONS = (
    "ResNet-18 with BlurPool, standard training, no colour changes, judged at 256 px with flip averaging, one A100 "
    "(the results of the project ffcv-imagenet)"
)


def names() -> list[str]:
    """Names of the built-in recipes: the reference first, the digits last."""
    found = [path.stem for path in FOLDER.glob("*.toml")]
    return sorted(found, key=lambda name: (name.startswith(DIGITS), name != REFERENCE, len(name), name))


def describe() -> str:
    """A list of the recipes: the purpose of each, and the options that differ from the reference."""
    reference, parts = load(REFERENCE), []
    for name in names():
        headline = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        parts.append(f"{name}: {headline}")
        words = [f"{flag(key)}={as_typed(value)}" for key, value in load(name).items() if reference.get(key) != value]
        parts += textwrap.wrap(
            "  ".join(words), 112, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
    parts += [
        "",
        "Flags override a recipe: --recipe fast --epochs 32. Your own TOML file works too: --recipe FILE.",
        "docs/training.md lists published accuracies for 16 to 88 epochs.",
    ]
    return "\n".join(parts)


def todays_flags(flags: Mapping[str, str]) -> dict[str, str]:
    """Raw flags of a training, with the names and recipes of older versions renamed to today's."""
    found = todays_names(flags)
    if of_ladder := _LADDER.fullmatch(found.get("recipe", "")):
        found = {"epochs": of_ladder[1], **found, "recipe": FAST}
    return found


def todays_command(command: str) -> str:
    """A recorded command line of launch.py, with the names and recipes of older versions renamed to today's."""
    command = _RECIPE_WORDS.sub(rf"--recipe {FAST} --epochs \1", command)
    return _FLAG.sub(lambda found: flag(RENAMED.get(name := found[1].replace("-", "_"), name)), command)


def recipe_as_typed(recipe: str, epochs: int) -> str:
    """The value of --recipe for a training of this or an older version, with --epochs if the recipe has others."""
    recipe = todays_flags({"recipe": recipe})["recipe"]
    try:
        own = load(recipe).get("epochs", _ANY.epochs)
    except UserError:  # a file that is gone
        return recipe
    return recipe if epochs == own else f"{recipe} --epochs {epochs}"


def default_recipe(data: str, *, limited: bool = False) -> str:
    """The recipe for these data without --recipe; with a budget, one whose schedule can be stretched."""
    if limited:
        return "digits_linear" if data == DIGITS else FAST
    return DIGITS if data == DIGITS else REFERENCE


def train_config(raw: Mapping[str, str], preset: Mapping[str, Any] | None = None) -> TrainConfig:
    """The configuration of a training. Raw flags override its recipe, which overrides `preset`.

    Raises:
        UserError: on an invalid recipe or flag.

    """
    limited = any(budget in raw for budget in BUDGETS)
    name = raw.get("recipe") or default_recipe(raw.get("data", ""), limited=limited)
    return parse(TrainConfig, {**raw, "recipe": name}, {**(preset or {}), **load(name)})


def load(name: str) -> dict[str, Any]:
    """The values of a built-in recipe or of a TOML file, by field name.

    Raises:
        UserError: naming the file and the key.

    """
    path = FOLDER / f"{name}.toml" if name in names() else Path(name)
    if (found := _LADDER.fullmatch(name)) and not path.exists():
        raise UserError(f"--recipe {name}: replaced by --recipe {FAST} --epochs {found[1]}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--recipe {name}: no such recipe or file", f"choose one of {', '.join(names())}") from None
    except OSError as error:
        raise UserError(f"--recipe {name}: cannot be read ({error.strerror})", "name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {name}: invalid TOML ({error})", f"see {FOLDER / 'reference.toml'}") from None
    hints = typing.get_type_hints(TrainConfig)
    values = {}
    for key, value in content.items():
        if key in _KEYS:
            values[key] = _typed(name, key, value, hints[key])
        else:
            renamed = RENAMED.get(key, "")
            what = "not allowed in a recipe; give it as a flag" if key in hints else "no such option"
            what = f"renamed to {renamed}" if renamed in _KEYS else what
            raise UserError(f"--recipe {name}: {key}: {what}", f"a recipe may hold {', '.join(sorted(_KEYS))}")
    try:
        dataclasses.replace(_ANY, **values)
    except UserError as error:
        text = str(error).removeprefix("--")
        key, _, rest = text.partition(" ")
        raise UserError(f"--recipe {name}: {key.replace('-', '_')} = {rest}", "correct the file") from None
    return values


def _typed(name: str, key: str, value: Any, hint: Any) -> Any:
    """Convert a TOML value to the type of its option: whole numbers to floats, arrays to tuples."""
    if typing.get_origin(hint) is tuple:
        of = typing.get_args(hint)
        if isinstance(value, list) and (of[-1] is Ellipsis or len(value) == len(of)):
            return tuple(_typed(name, key, item, of[0]) for item in value)
        expected = "an array of numbers" if of[-1] is Ellipsis else f"an array of {len(of)} numbers"
    elif type(value) is hint and (hint is not float or math.isfinite(value)):
        return value
    elif hint is float and type(value) is int:
        return float(value)
    else:
        expected = _EXPECTED[hint]
    raise UserError(f"--recipe {name}: {key} = {value}: expected {expected}", "correct the file")
