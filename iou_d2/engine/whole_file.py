"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable


def replace_file(path: str, write: Callable) -> None:
    """Write all of `path` or nothing. `write` gets the file, open for bytes.

    Raises OSError with `path` where the disk refuses it; no part of it is left.
    """
    unfinished = f"{path}.{os.getpid()}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        _remove(unfinished)
        refused = _refusal_behind(error)
        if refused is None:
            raise
        raise OSError(refused.errno, os.strerror(refused.errno), path) from None


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except FileNotFoundError:
        pass


def _refusal_behind(error: BaseException | None) -> OSError | None:
    """The OSError that began it: torch.save raises errors of its own after it."""
    found = None
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            found = error
        error = error.__cause__ or error.__context__
    return found
