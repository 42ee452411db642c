"""Settings that must be made before torch is imported, and where the libraries of a parallel run write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from typing import IO

import pytest

# Tests share the machine's few cores with processes that they start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

WRITTEN = pytest.StashKey[IO[bytes]]()


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart(session: pytest.Session) -> Generator[None, None, None]:
    """Let the processes of a parallel run inherit a file as their stderr.

    Between the phases of a test pytest captures nothing. A decoder's thread that complains of a damaged image at such a
    moment would write to the terminal.
    """
    if not session.config.pluginmanager.hasplugin("dsession"):
        return (yield)
    written = session.config.stash[WRITTEN] = tempfile.TemporaryFile()  # noqa: SIM115  (open until the session ends)
    terminal = os.dup(2)
    os.dup2(written.fileno(), 2)
    try:
        return (yield)
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Show that file where something failed."""
    written = config.stash.get(WRITTEN, None)
    if written is None or exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return
    written.seek(0)
    if text := written.read().decode(errors="replace"):
        terminalreporter.section("stderr of the processes, outside of tests")
        terminalreporter.write(text)
