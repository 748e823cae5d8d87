"""Values of a user's COCO JSON: what has one meaning is read, everything else is None.

"0" and 0.0 are the id 0, "8.5" is the number 8.5, "true" is the flag 1.
"""

from __future__ import annotations

import re
from typing import Any

# What float() takes beyond this ("1_000", "nan", Arabic digits) is not sure to be meant.
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_WHOLE = re.compile(r"\s*[+-]?\d{1,19}(\.0*)?\s*", re.ASCII)
_FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1, "": 0}


def as_number(value: Any) -> int | float | None:
    """A finite number below 1e12, as it is or read from a string."""
    if isinstance(value, str):
        if len(value) > 100 or not _NUMBER.fullmatch(value):
            return None
        value = float(value)
    # The comparison fails for NaN and infinity, and for integers beyond every float.
    return value if isinstance(value, (int, float)) and -1e12 < value < 1e12 else None


def as_id(value: Any) -> int | None:
    """An integer that NumPy, which COCOeval counts with, can hold; no bool."""
    if isinstance(value, str):
        if not _WHOLE.fullmatch(value):
            return None
        value = int(value.strip().partition(".")[0])
    elif isinstance(value, float):
        if not value.is_integer() or abs(value) >= 2**53:
            return None
        value = int(value)
    return value if type(value) is int and abs(value) < 2**63 else None


def as_size(value: Any) -> int | None:
    """A side of an image in whole pixels, 0 for one that is not given; None for anything else."""
    if value is None or value == "":
        return 0
    side = as_id(value)
    return side if side is not None and side >= 0 else None


def as_flag(value: Any) -> int | None:
    """0 or 1; null and "" count as 0."""
    if value is None:
        return 0
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return int(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def is_text(value: Any) -> bool:
    """Whether this is a string that can be written in UTF-8 and be a part of a path."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def short(value: Any) -> str:
    """`repr` that fits a sentence."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits; deep nesting
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def where(kind: str, index: int, record: Any) -> str:
    """A record in words, as `annotations[7] (id 42)`."""
    has_id = isinstance(record, dict) and "id" in record
    return f"{kind}[{index}] (id {short(record['id'])})" if has_id else f"{kind}[{index}]"
