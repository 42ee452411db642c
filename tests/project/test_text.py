"""What people read: no addresses of package registries, no leftovers, and a docstring on everything public."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "pipelines", "fast_spatial")
# What a working copy may hold besides the project.
OUTSIDE = ("runs", "build", "shared", "venv", "env")
# Written in halves, so that this file holds none of them: hosts that a user's own settings decide about, marks of
# unfinished work, folders of one machine.
FORBIDDEN = tuple(
    "".join(halves)
    for halves in (
        *(("pypi", ".org"), ("files.python", "hosted.org"), ("pypi.nvid", "ia.com"), ("download.pyt", "orch.org")),
        *(("conda.ana", "conda.org"), ("registry-1.dock", "er.io")),
        *(("TO", "DO"), ("FIX", "ME"), ("X", "XX")),
        *(("/work/", "main"), ("/work/", "shared"), ("../", "shared/")),
    )
)


def texts() -> list[Path]:
    """The texts of the project, from its root: sources, documents, and what builds it."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in OUTSIDE and path.name[0] != "."]
    found = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.iterdir())
    named = [ROOT / "Makefile", ROOT / "Dockerfile", ROOT / ".ci" / "run"]
    wanted = {path for path in found if path.suffix in (".py", ".md", ".txt", ".toml")} | {*named}
    return sorted(path.relative_to(ROOT) for path in wanted if path.is_file())


def lines_with(text: str) -> list[str]:
    """The lines of a text that hold something forbidden."""
    return [line for line in text.splitlines() if any(word.lower() in line.lower() for word in FORBIDDEN)]


def test_the_texts_are_found():
    assert {Path("launch.py"), Path("kernels/spatial.py"), Path("Makefile"), Path("pyproject.toml")} <= set(texts())
    assert not any(".venv" in path.parts for path in texts())


@pytest.mark.parametrize("path", texts(), ids=str)
def test_a_text_holds_nothing_forbidden(path):
    assert lines_with((ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("word", FORBIDDEN)
def test_something_forbidden_would_be_found(word):
    assert lines_with(f"one\npip install --find-links https://{word.upper()}/simple\nthree") != []


def undocumented(source: str) -> Iterator[str]:
    """The module, and the public classes and functions of it, that have no docstring."""
    tree = ast.parse(source)
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield node.name


@pytest.mark.parametrize("path", [p for p in texts() if p.suffix == ".py" and p.parts[0] in PACKAGES], ids=str)
def test_everything_public_has_a_docstring(path):
    assert list(undocumented((ROOT / path).read_text(encoding="utf-8"))) == []


def test_a_missing_docstring_would_be_found():
    source = 'def f():\n    """Does."""\n\n\nclass C:\n    x = 1\n\n\ndef _hidden():\n    pass\n'
    assert list(undocumented(source)) == ["the module", "C"]
