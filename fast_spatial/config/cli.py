"""The command line: flags to raw values, and the help made of the options' fields."""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from typing import Any

import fire
from fire.decorators import SetParseFn

from fast_spatial.config.fields import RENAMED, SECTIONS, as_typed, flag, is_several, is_switch, metavar_of
from fast_spatial.errors import UserError

NAME = "launch.py"
Options = dict[str, "Field[Any]"]
_HELP = ("--help", "-h", "help")
_WIDTH = 120
_INDENT = 34


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the registry.

    Attributes:
        help: one sentence for the list of commands.
        options: the fields that are its flags.
        read: makes the configuration from the raw values of the given flags.
        preflight: checks the configuration first; None if `run` starts tasks, since each task is checked.
        run: the function of the command; takes the configuration and the raw values.
        positional: the field whose value may come first, without its flag. A field with several values may take
            several words.

    """

    help: str
    options: Options
    read: Callable[[dict[str, str]], Any]
    preflight: Callable[[Any], object] | None
    run: Callable[[Any, dict[str, str]], None]
    positional: str = ""


def options_of(*kinds: type, without: Sequence[str] = ()) -> Options:
    """The options of one or more configurations by field name, section by section, required ones first."""
    # Of options of one name, the first configuration's is described.
    fields = {f.name: f for kind in reversed(kinds) for f in dataclasses.fields(kind) if f.name not in without}
    place = {name: SECTIONS.index(f.metadata["section"]) for name, f in fields.items()}
    return dict(sorted(fields.items(), key=lambda item: (not item[1].metadata["required"], place[item[0]])))


def dispatch(commands: Mapping[str, Command], argv: Sequence[str], *, renamed: Mapping[str, str]) -> None:
    """Run a command line.

    Args:
        commands: the registry, by name.
        argv: the words of the command line, without the program's name.
        renamed: old names of commands, with their new names.

    Raises:
        UserError: on anything that is not a known command with known flags and their values.

    """
    if not argv or argv[0] in _HELP:
        print(overview(commands))
        return
    name, *words = argv
    if name in renamed:
        raise UserError(f"{name}: renamed to {renamed[name]}")
    if name not in commands:
        raise UserError(f"{name}: unknown command{_nearest(name, commands)}; choose one of {', '.join(commands)}")
    command = commands[name]
    if {"--help", "-h"} & {*words}:
        print(help_of(name, command))
        return
    if command.positional and words and not words[0].startswith("-"):
        first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        count = first if is_several(command.options[command.positional]) else 1
        words[:count] = [f"{flag(command.positional)}={','.join(words[:count])}"]
    raw = read_flags(words, command.options)

    @SetParseFn(str)  # fire would turn "2012" into a number
    def run(**values: str) -> None:
        config = command.read(values)
        if command.preflight is not None:
            command.preflight(config)
        command.run(config, values)

    fire.Fire({name: run}, command=[name, *(f"--{key}={value}" for key, value in raw.items())], name=NAME)


def read_flags(words: Sequence[str], options: Options) -> dict[str, str]:
    """Raw values by field name, of `--flag value`, `--flag=value`, `--switch` and `--noswitch`.

    Raises:
        UserError: on a stray word, a one-letter, unknown or renamed flag, a missing value, or a flag given twice.

    """
    raw: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if re.fullmatch(r"-[A-Za-z](=.*)?", word):
            raise UserError(f"{word}: one-letter flags do not exist; write the flag out")
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word}: unexpected word; every value needs its flag, as in --data {word}")
        text, equals, value = word[2:].partition("=")
        name = text.replace("-", "_")
        off = name.removeprefix("no").removeprefix("_")
        if name not in options and off != name and off in options and is_switch(options[off]):
            if equals:
                raise UserError(f"{word}: {flag(name)} takes no value")
            name, value = off, "false"
        elif name not in options:
            raise UserError(_unknown(name, options))
        elif not equals and is_switch(options[name]):
            value = queue.pop(0) if queue and queue[0].lower() in ("true", "false") else "true"
        elif not equals:
            if not queue or (queue[0].startswith("-") and not _is_number(queue[0])):
                raise UserError(f"{flag(name)}: missing value")
            value = queue.pop(0)
        if name in raw:
            raise UserError(f"{flag(name)}: given twice")
        raw[name] = value
    return raw


def _unknown(name: str, options: Options) -> str:
    if RENAMED.get(name) in options:
        return f"{flag(name)}: renamed to {flag(RENAMED[name])}"
    return f"{flag(name)}: unknown flag{_nearest(flag(name), [*map(flag, options), _HELP[0]])}"


def _is_number(word: str) -> bool:
    try:
        float(word.split(",", maxsplit=1)[0])
    except ValueError:
        return False
    return True


def _nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def help_of(name: str, command: Command) -> str:
    """The help of a command: its required flags, then the others by section, with the defaults as they are typed."""
    required = [option for option in command.options.values() if option.metadata["required"]]
    words = [f"{flag(option.name)} {metavar_of(option)}" for option in required if option.name != command.positional]
    if command.positional:
        first = command.options[command.positional]
        words.insert(0, f"{metavar_of(first)} ..." if is_several(first) else f"[{metavar_of(first)}]")
    rest = ["[--flag value ...]"] if len(command.options) > len(required) else []
    lines = [command.help, "", f"usage: {' '.join([NAME, name, *words, *rest])}"]
    sections: dict[str, list[Field[Any]]] = {"required": required} if required else {}
    for option in command.options.values():
        if option not in required:
            sections.setdefault(option.metadata["section"], []).append(option)
    for section, options in sections.items():
        lines += ["", f"{section}:", *(line for option in options for line in _lines(option))]
    return "\n".join(lines)


def _lines(option: Field[Any]) -> list[str]:
    """An option's lines in the help: flag, placeholder of its value, description and default."""
    is_plain_switch = is_switch(option) and not option.default
    left = f"  {flag(option.name)} {'' if is_plain_switch else metavar_of(option)}".rstrip()
    text, default = option.metadata["help"], as_typed(option.default)
    if f"({default}: " in text:  # the text already explains the default
        text = text.replace(f"({default}: ", f"(default: {default} = ")
    elif default:
        text += f" (default: {default})"
    wrapped = textwrap.wrap(text, _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False)
    if len(left) < _INDENT - 1:
        return [f"{left:<{_INDENT}}{wrapped[0]}", *(" " * _INDENT + line for line in wrapped[1:])]
    return [left, *(" " * _INDENT + line for line in wrapped)]


def overview(commands: Mapping[str, Command]) -> str:
    """The list of all commands."""
    width = max(map(len, commands))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in commands.items()]
    return "\n".join(
        [f"usage: {NAME} COMMAND [--flag value ...]", "", *rows, "", f"{NAME} COMMAND --help lists its flags."]
    )
