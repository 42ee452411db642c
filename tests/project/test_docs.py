"""README and docs: their length, links, commands, flags, modules and examples."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fast_spatial import commands
from fast_spatial.config.cli import read_flags

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").is_file())
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# The changelog names flags and modules that are gone.
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
# Flags of other programs, as they appear in text.
FOREIGN = {
    *("--bind", "--check", "--dry", "--gpus", "--init", "--ipc", "--json_file", "--kill-on-bad-exit", "--nv"),
    *("--pwd", "--requeue", "--signal", "--stop-timeout", "--user", "--all"),
}
# What a command line contains, and what the text around it must say it needs.
NEEDS = {"/data/imagenet": "ImageNet", "docker ": "Docker", "srun ": "Slurm", "gpu.sh": "GPU"}
SHELLS = ("sh", "bash")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def handwritten(text: str) -> str:
    """The text without its generated blocks: their captions hold commands as they were once given."""
    return re.sub(r"<!-- results: .*?<!-- end -->", "", text, flags=re.DOTALL)


def fences(text: str) -> Iterator[tuple[str, str, str]]:
    """(language, code, text before it) of every block of code."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        yield match[1], match[2], text[: match.start()]


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def command_lines(text: str) -> Iterator[list[str]]:
    """The words after `launch.py` of every command in blocks of code and in inline code."""
    lines = [
        line for kind, code, _ in fences(text) if kind in SHELLS for line in code.replace("\\\n", " ").splitlines()
    ]
    for line in [*lines, *re.findall(r"`([^`]+)`", prose(text))]:
        words = shlex.split(line, comments=True) if "launch.py" in line else []
        starts = [k for k, word in enumerate(words) if word.endswith("launch.py")]
        if starts and len(words) > starts[0] + 1:
            yield words[starts[0] + 1 :]


def refusal(words: Sequence[str]) -> str:
    """Why the command line does not take these words; "" if it does."""
    command, *flags = words
    if command not in commands.COMMANDS:
        return f"{command}: no such command"
    known = commands.COMMANDS[command]
    flags = [word for word in flags if word != "--help"]
    while known.positional and flags and not flags[0].startswith("-"):
        flags.pop(0)
    try:
        read_flags(flags, known.options)
    except Exception as error:  # of whatever type: its words are what is compared
        return str(error)
    return ""


def known_flags() -> set[str]:
    names = {option for command in commands.COMMANDS.values() for option in command.options}
    return {f"--{prefix}{option.replace('_', '-')}" for option in names for prefix in ("", "no-")} | {"--help"}


def unknown_flags(text: str) -> list[str]:
    """The flags in inline code that neither launch.py nor another program takes."""
    code = " ".join(re.findall(r"`([^`]+)`", prose(text)))
    return sorted({*re.findall(r"(?<![\w-])--[a-z][\w-]*", code)} - known_flags() - FOREIGN)


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for target in re.findall(r"\]\(([^)]+)\)", prose(text)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in slugs(file.read_text(encoding="utf-8"))):
            found.append(target)
    return found


def unmarked(text: str) -> list[str]:
    """What commands need and neither their section, nor the page's beginning, nor a comment says."""
    top = re.split(r"^## ", prose(text), maxsplit=1, flags=re.MULTILINE)[0]
    found = []
    for kind, code, before in fences(text):
        section = re.split(r"^#+ ", prose(before), flags=re.MULTILINE)[-1]
        for mark, word in NEEDS.items():
            needed = re.compile(rf"needs? [^.]*\b{word}", flags=re.IGNORECASE)
            if kind in SHELLS and mark in code and not any(needed.search(part) for part in (code, section, top)):
                found.append(f"{word}: {code.splitlines()[0]}")
    return found


def test_the_readme_is_short_and_says_early_what_has_run():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    head = "\n".join(lines[:20])
    assert "## Status" in head
    assert all(f"**{what}**" in head for what in ("CPU", "GPU", "ImageNet", "Docker and Slurm"))


def test_the_readme_links_every_document():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    others = [page for page in PAGES if page.name != "README.md"]
    assert [name(page) for page in others if f"]({name(page)}" not in text] == []
    assert len(others) > 10


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_command_lines_are_taken(page):
    lines = [*command_lines(handwritten(page.read_text(encoding="utf-8")))]
    assert [f"{shlex.join(words)}: {why}" for words in lines if (why := refusal(words))] == []


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_flags_in_text_exist(page):
    assert unknown_flags(handwritten(page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_modules_in_text_exist(page):
    named = set(re.findall(r"python -m ((?:fast_spatial|kernels|pipelines|benchmarks)[\w.]*)", page.read_text("utf-8")))
    assert [module for module in sorted(named) if not (ROOT / f"{module.replace('.', '/')}.py").is_file()] == []


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_commands_are_marked_with_what_they_need(page):
    assert unmarked(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_every_option_is_documented(command):
    """Those of training in one page; of an evaluation those that are its own."""
    shared = {*commands.COMMANDS["train"].options} if command == "evaluate" else set()
    text = (ROOT / "docs" / f"{'training' if command == 'train' else 'evaluation'}.md").read_text(encoding="utf-8")
    written = {flag.replace("--no-", "--") for flag in re.findall(r"--[a-z][\w-]*", text)}
    options = {f"--{option.replace('_', '-')}" for option in {*commands.COMMANDS[command].options} - shared}
    assert sorted(options - written) == []
    assert len(options) >= 9


def test_renamed_flags_are_what_the_changelog_says():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("#### Renamed flags")[1].split("####")[0]
    rows = re.findall(r"^\| `--([\w-]+)` \| `--([\w-]+)` \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(rows) >= 10
    wrong = []
    for old, new, takers in rows:
        for command in takers.split(", "):
            options = commands.COMMANDS[command].options
            if old.replace("-", "_") in options or new.replace("-", "_") not in options:
                wrong.append(f"{command}: --{old} -> --{new}")
    assert wrong == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=name)
def test_python_examples_run(page):
    for kind, code, _ in fences(page.read_text(encoding="utf-8")):
        if kind == "python":
            exec(code, {})


def test_the_citation_names_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    found = dict(re.findall(r"^([\w-]+): (.+)$", citation, flags=re.MULTILINE))
    assert (found["title"], found["version"], found["license"]) == (
        project["name"],
        project["version"],
        project["license"],
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[a](docs/none.md)", ["docs/none.md"]),
        ("[a](README.md#no-such-heading)", ["README.md#no-such-heading"]),
        ("[a](README.md#status) [b](https://example.com)", []),
    ],
)
def test_a_broken_link_would_be_found(text, what):
    assert broken_links(ROOT / "README.md", text) == what


def test_a_wrong_command_would_be_found():
    lines = [
        *command_lines("```sh\npython launch.py train --dta x \\\n  --mode y  # comment\n```\n`launch.py nothing`")
    ]
    assert lines == [["train", "--dta", "x", "--mode", "y"], ["nothing"]]
    assert all(refusal(words) for words in lines)
    assert refusal(["report", "runs/a", "runs/b", "--out", "runs/report"]) == ""
    assert unknown_flags("`--dta` and `--data`") == ["--dta"]


def test_a_missing_mark_would_be_found():
    block = "```sh\nlaunch.py train --data /data/imagenet\n```"
    assert unmarked(f"# A\n\n## B\n\nText.\n\n{block}") == ["ImageNet: launch.py train --data /data/imagenet"]
    assert unmarked(f"# A\n\n*Needs ImageNet.*\n\n## B\n\n{block}") == []
    assert unmarked(f"# A\n\n## C\n\n*Needs ImageNet.*\n\n## B\n\n{block}") != []
