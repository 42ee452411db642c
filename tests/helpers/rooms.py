"""The rooms of the project, their order, and what each imports; `python -m tests.helpers.rooms` draws them.

The drawing stands in ARCHITECTURE.md. `tests/project/test_layers.py` compares it with the imports.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From the bottom to the top: a room may import those on earlier lines. Rooms on one line do not know each other.
ORDER = (
    ("errors",),
    ("kernels",),
    ("pipelines",),
    ("config", "runtime"),
    ("data", "models"),
    ("evaluation",),
    ("training", "reporting"),
    ("preflight",),
    ("worker",),
    ("launcher", "tools"),
    ("budget",),
    ("reproduce",),
    ("commands",),
    ("launch",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Imported by nobody but themselves.
APART = ("benchmarks", "tests")
# The package itself: the Python API, imported when it is asked for.
FRONT = "fast_spatial"


def name_of(path: Path) -> str:
    """The dotted name of a module by its path from the root; kernels/ and pipelines/ are in the package by a link."""
    parts = path.with_suffix("").parts
    dotted = ".".join((FRONT, *parts) if parts[0] in ("kernels", "pipelines") else parts)
    return dotted.removesuffix(".__init__")


def modules() -> dict[str, str]:
    """The project's modules: dotted name to source."""
    folders = ("kernels", "pipelines", FRONT, *APART)
    # `rglob` does not follow the links in the package, so nothing is found twice.
    paths = [ROOT / "launch.py", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]
    return {name_of(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def imports(name: str, source: str, known: Iterable[str]) -> Iterator[str]:
    """Dotted names of all that a module imports, anywhere in it: in functions and for type checkers, too."""
    known = set(known)
    # What a relative import starts from: of a package, the package itself.
    inside = any(other.startswith(f"{name}.") for other in known)
    package = name.split(".") if inside else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield full if full in known else ".".join(base)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def room_of(name: str) -> str:
    """The room of a module: the first part of its name in the package, or outside of it."""
    first, *rest = name.split(".")
    return rest[0] if first == FRONT and rest else first


def is_upward(importer: str, imported: str) -> bool:
    """Whether an import goes up, sideways, or to where nobody should."""
    home, target = room_of(importer), room_of(imported)
    if home == target or importer == FRONT:
        return False
    if target in APART or (target == FRONT and home in LEVEL):
        return True
    if imported.split(".", maxsplit=1)[0] in (
        "kernels",
        "pipelines",
    ):  # there is no such package: it is fast_spatial.kernels
        return True
    return home in LEVEL and target in LEVEL and LEVEL[target] >= LEVEL[home]


def cycle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle; [] if none do."""
    # All import the package, which imports nothing of them until it is asked.
    graph = {
        name: sorted({*imports(name, text, sources)} & sources.keys() - {name, FRONT})
        for name, text in sources.items()
        if name != FRONT
    }
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (visit(below, [*path, name]) for below in graph[name])), [])
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in graph)), [])


def drawing(sources: Mapping[str, str]) -> str:
    """A matrix of the rooms from the top to the bottom: each row imports the rooms marked in its columns."""
    rooms = [room for level in reversed(ORDER) for room in level]
    used: dict[str, set[str]] = {room: set() for room in rooms}
    for name, text in sources.items():
        if name != FRONT and room_of(name) in used:
            found = {room_of(other) for other in imports(name, text, sources) if other.split(".")[0] == FRONT}
            used[room_of(name)] |= found & used.keys() - {room_of(name)}
    width = max(map(len, rooms))
    lines = [f"{'':<{width}}  " + " ".join(f"{number:>2}" for number in range(1, len(rooms) + 1))]
    for number, room in enumerate(rooms, 1):
        marks = (" ■" if other in used[room] else " ╲" if other == room else " ·" for other in rooms)
        lines.append(f"{room:<{width}}  {' '.join(marks)}   {number}")
    return "\n".join(["```text", *lines, "```"])


def with_drawing(text: str, sources: Mapping[str, str]) -> str:
    """A document with today's drawing between its marks."""
    return re.sub(
        r"(<!-- rooms -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{drawing(sources)}\n{m[2]}", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    document = ROOT / "ARCHITECTURE.md"
    document.write_text(with_drawing(document.read_text(encoding="utf-8"), modules()), encoding="utf-8")
