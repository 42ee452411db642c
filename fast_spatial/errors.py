"""What the people who use this program did wrong, apart from what is wrong with the program."""

from __future__ import annotations


class UserError(Exception):
    """Input that cannot be used. It is shown in two lines, without a traceback; any other exception keeps its own.

    Args:
        message: what happened, where, and the value.
        advice: what to do; empty: see the command's help.

    """

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message, advice)
        self.message, self.advice = message, advice

    def __str__(self) -> str:
        return "\n".join(filter(None, [self.message, self.advice]))
