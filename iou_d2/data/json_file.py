"""JSON files of a user, broken or hostile ones too: their content, or one sentence."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iou_d2.errors import InputError, MissingFileError

from .packed_list import PackedList

_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")

_SPACE = re.compile(r"[ \t\n\r]*")
_BETWEEN_DICTS = re.compile(r"\}[ \t\n\r]*,[ \t\n\r]*(?=\{)")
_PIECE = 2**20  # characters


def parse_json(
    path: str | os.PathLike[str], what: str = "file", packed: str | None = None
) -> tuple[Any, bool]:
    """The content of a JSON file, and whether it begins with a byte-order mark.

    UTF-8, UTF-16 and UTF-32 are read. NaN and infinity are, as Python does.

    Args:
        packed: key of the outermost dict whose list, if it is one, is given as a `PackedList`,
            and never stands in memory unpacked.

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
            return _parse(text, packed), has_mark
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


def _parse(text: str, packed: str | None) -> Any:
    if packed is not None:
        try:
            return _outer_dict(text, packed)
        except (StopIteration, IndexError, _Irregular):
            pass  # no JSON, or no dict: the parser below says which
    return json.loads(text, object_pairs_hook=_object)


class _Irregular(Exception):
    pass


def _outer_dict(text: str, packed: str) -> dict[str, Any]:
    """A dict, parsed value by value. Raises something where `text` is not all of one."""
    scan = json.JSONDecoder(object_pairs_hook=_object).scan_once
    pairs = []
    at = _after(text, "{", _skip(text, 0))
    while True:
        key, at = scan(text, at)
        if not isinstance(key, str):
            raise _Irregular
        at = _after(text, ":", _skip(text, at))
        if key == packed and text[at] == "[":
            value, at = _packed_list(text, _skip(text, at + 1), scan)
        else:
            value, at = scan(text, at)
        pairs.append((key, value))
        at = _skip(text, at)
        if text[at] != ",":
            break
        at = _skip(text, at + 1)
    if _after(text, "}", at) != len(text):
        raise _Irregular
    return _object(pairs)


def _packed_list(text: str, at: int, scan) -> tuple[PackedList, int]:
    """The list whose first value begins at `at`, and where the text goes on after its bracket."""
    packed = PackedList()
    if text[at] == "]":
        return packed, at + 1
    while True:
        cut = _BETWEEN_DICTS.search(text, at + _PIECE, at + 2 * _PIECE)
        try:
            if cut is None:
                raise ValueError
            values = json.loads(f"[{text[at : cut.start() + 1]}]", object_pairs_hook=_object)
            at, is_end = cut.end(), False
        except ValueError:  # this is no place between two values of this list
            values, at, is_end = _piece(text, at, scan)
        packed.extend(values)
        if is_end:
            return packed, at


def _piece(text: str, at: int, scan) -> tuple[list[Any], int, bool]:
    """Values of a list from `at` on, where the text goes on, and whether the list ends there."""
    values, stop = [], at + _PIECE
    while at < stop:
        value, at = scan(text, at)
        values.append(value)
        at = _skip(text, at)
        if text[at] == "]":
            return values, at + 1, True
        at = _after(text, ",", at)
    return values, at, False


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _after(text: str, sign: str, at: int) -> int:
    """Where the text goes on after `sign`, which must be at `at`, and space."""
    if text[at] != sign:
        raise _Irregular
    return _skip(text, at + 1)


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
