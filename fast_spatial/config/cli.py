"""The command line's strictness: fire supplies commands and help, this decides what may reach them.

fire calls a command first and complains about unknown flags afterwards, guesses types, and takes stray words,
abbreviations and missing values for something else. So every word is checked here before fire sees it, values stay
raw strings until `config.parse` types them, and help texts are made from the configurations' fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import Field
from typing import Any

import fire
from fire import helptext, trace
from fire.decorators import SetParseFn

from fast_spatial.config.fields import flag
from fast_spatial.config.train import BudgetOptions, LaunchOptions
from fast_spatial.errors import UserError

NAME = "launch.py"
Options = dict[str, "Field[Any]"]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what it does in a sentence, the fields that are its flags, and the function its raw values go to.

    `positional` names the field that may be given as the first word, without its flag; as the first words, if it
    holds several values.
    """

    help: str
    options: Options
    call: Callable[[dict[str, str]], None]
    positional: str = ""


def options_of(*kinds: type, without: Sequence[str] = ()) -> Options:
    """The options of one or more configurations, by field name; those of budgets and of the processes last."""
    fields = [f for kind in kinds for f in dataclasses.fields(kind) if f.name not in without]
    launch, budget = ({f.name for f in dataclasses.fields(shared)} for shared in (LaunchOptions, BudgetOptions))
    return {f.name: f for f in sorted(fields, key=lambda f: (f.name in launch, f.name in budget))}


def dispatch(commands: dict[str, Command], argv: Sequence[str]) -> None:
    """Run a command line.

    Raises:
        UserError: on anything that is not a known command with known flags and their values.

    """
    functions = {name: _function(command) for name, command in commands.items()}
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview(commands))
        return
    name, *words = argv
    if name not in commands:
        raise UserError(f"{name}: no such command{_nearest(name, commands)}; choose one of {', '.join(commands)}")
    if "--help" in words or "-h" in words:
        print(_help(name, functions[name]))
        return
    positional = commands[name].positional
    if positional and words and not words[0].startswith("-"):
        first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        count = first if _is_several(commands[name].options[positional]) else 1
        words[:count] = [f"{flag(positional)}={','.join(words[:count])}"]
    raw = read_flags(words, commands[name].options)
    fire.Fire(functions, command=[name, *(f"--{key}={value}" for key, value in raw.items())], name=NAME)


def read_flags(words: Sequence[str], options: Options) -> dict[str, str]:
    """Raw values by field name, of `--flag value`, `--flag=value`, `--switch` and `--noswitch`.

    Raises:
        UserError: on a stray word, a one-letter flag, an unknown flag, a missing value, or a flag given twice.

    """
    raw: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if re.fullmatch(r"-[A-Za-z](=.*)?", word):
            raise UserError(f"{word}: one-letter flags are not taken; write the flag out")
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word}: a stray word; every value needs its flag, as in --data {word}")
        text, equals, value = word[2:].partition("=")
        name = text.replace("-", "_")
        off = name.removeprefix("no").removeprefix("_")
        if name not in options and off != name and off in options and _is_switch(options[off]):
            if equals:
                raise UserError(f"{word}: {flag(name)} takes no value")
            name, value = off, "false"
        elif name not in options:
            raise UserError(f"{flag(name)}: no such flag{_nearest(flag(name), map(flag, options))}")
        elif not equals and _is_switch(options[name]):
            value = queue.pop(0) if queue and queue[0].lower() in ("true", "false") else "true"
        elif not equals:
            if not queue or (queue[0].startswith("-") and not _is_number(queue[0])):
                raise UserError(f"{flag(name)}: its value is missing")
            value = queue.pop(0)
        if name in raw:
            raise UserError(f"{flag(name)}: given twice")
        raw[name] = value
    return raw


def _is_switch(option: Field[Any]) -> bool:
    return option.type in (bool, "bool")


def _is_several(option: Field[Any]) -> bool:
    return str(option.type).startswith("tuple")


def _is_number(word: str) -> bool:
    try:
        float(word.split(",", maxsplit=1)[0])
    except ValueError:
        return False
    return True


def _nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _function(command: Command) -> Callable[..., None]:
    """A function with the command's flags as its signature, for fire to describe and call."""

    def function(**raw: str) -> None:
        command.call(raw)

    lines = [command.help, "", "Args:"]
    for name, option in command.options.items():
        choices = option.metadata["choices"]
        lines.append(f"    {name}: {option.metadata['help']}" + (f" ({', '.join(choices)})" if choices else ""))
    function.__doc__ = "\n".join(lines)
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
            for name, option in command.options.items()
        ]
    )
    described: Callable[..., None] = SetParseFn(str)(function)
    return described


def _help(name: str, function: Callable[..., None]) -> str:
    """Fire's help without what is not taken here: one-letter flags, and fire's own bookkeeping."""
    text = helptext.HelpText(function, trace.FireTrace(function, name=f"{NAME} {name}"))
    text = (
        text.split("\nGROUPS\n")[0].replace("GROUP | <flags>", "<flags>").replace(f"'{NAME} {name}'", f"{NAME} {name}")
    )
    text = re.sub(r"^(\s+)-\w, --", r"\1--", text, flags=re.MULTILINE)
    text = re.sub(r"^\s+(Type: Optional\[\]|Default: ('')?)\n", "", text, flags=re.MULTILINE)
    return re.sub(r"--(\w+)=(\w+)", lambda m: f"{flag(m[1])} {m[2]}", text).rstrip()


def _overview(commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in commands.items()]
    return "\n".join(
        [f"usage: {NAME} COMMAND [--flag value ...]", "", *rows, "", f"{NAME} COMMAND --help lists its flags."]
    )
