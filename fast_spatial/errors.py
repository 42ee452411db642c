"""The exception for invalid input of a user."""

from __future__ import annotations


class UserError(Exception):
    """Invalid input. It is printed as two lines without a traceback; other exceptions keep their traceback.

    Args:
        message: what happened, where, and the value.
        advice: what to do; empty: a pointer to the command's help.

    """

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message, advice)
        self.message, self.advice = message, advice

    def __str__(self) -> str:
        return "\n".join(filter(None, [self.message, self.advice]))
