"""Errors of worker processes: written to torchrun's error file and read by the launcher."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from fast_spatial.errors import UserError


def leave_failure(error: Exception) -> None:
    """Write an exception to torchrun's error file.

    torchrun reads the message and the time, and passes on all other fields.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content: dict[str, Any] = {"message": f"{type(error).__name__}: {error}", "timestamp": int(time.time())}
        if isinstance(error, UserError):
            content["user_error"] = {"message": error.message, "advice": error.advice}
        Path(file).write_text(json.dumps(content), encoding="utf-8")


def user_error_of(failure: Any) -> UserError | None:
    """The UserError in a process's `ProcessFailure`, or None for any other failure."""
    left = failure.error_file_data.get("user_error")
    return UserError(**left) if left else None
