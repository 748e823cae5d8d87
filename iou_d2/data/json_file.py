"""JSON files of a user, broken or hostile ones too: their content, or one sentence."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iou_d2.errors import InputError, MissingFileError

_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def parse_json(path: str | os.PathLike[str], what: str = "file") -> tuple[Any, bool]:
    """The content of a JSON file, and whether it begins with a byte-order mark.

    UTF-8, UTF-16 and UTF-32 are read. NaN and infinity are, as Python does.

    Raises:
        MissingFileError: there is no such file; `what` says what it would be.
        InputError: it cannot be read, is not JSON, or gives a key of one object twice.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no {what} {path}.")
    try:
        raw = path.read_bytes()
        has_mark = raw.startswith(_MARKS)
        text = raw.decode(json.detect_encoding(raw))
        del raw
        with no_garbage_collection():
            return json.loads(text, object_pairs_hook=_object), has_mark
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {_place(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}.") from error
    except RecursionError as error:
        raise InputError(f"{path} nests brackets too deep to be read.") from error
    except MemoryError as error:
        raise InputError(f"{path} is too large for the memory of this machine.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # ours on keys, and Python's on integers of thousands of digits
        raise InputError(f"{path} cannot be read: {error}.") from error


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """While millions of objects are made that all stay, looking for garbage doubles the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"one object has the key {twice[:100]!r} twice")
    return content


def _place(error: json.JSONDecodeError) -> str:
    is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
    hint = " Is the file cut short?" if is_cut else ""
    return (
        f"{error.msg} at line {error.lineno}, column {error.colno} (character {error.pos} of "
        f"{len(error.doc)}).{hint}"
    )
