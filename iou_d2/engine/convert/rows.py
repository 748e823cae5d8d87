"""Tables of names: what a tensor is called elsewhere and in Detectron2, and how its numbers differ.

In a name, "#" stands for a number and "*" for the last part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

# The tensor, and all tensors of its side by name -> the tensor of the other side.
Rewrite = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class Change(NamedTuple):
    """How the numbers of a tensor differ, in both directions.

    `told` is a clause for the user, such as "the background comes last".
    """

    to_ours: Rewrite
    to_theirs: Rewrite
    told: str = ""


class Row(NamedTuple):
    """Where two rows of a table have the same `ours`, the first is the one to write."""

    theirs: str
    ours: str
    change: Change | None = None


class Match(NamedTuple):
    """The name on the other side, and how to get there."""

    name: str
    change: Change | None


def find_rows(names: Iterable[str], rows: list[Row], to_ours: bool) -> dict[str, Match]:
    """Name -> what the first row that has it says, in one direction; names without a row are left
    out."""
    rules = []
    for row in rows:
        old, new = (row.theirs, row.ours) if to_ours else (row.ours, row.theirs)
        pattern = re.escape(old).replace(r"\#", r"(\d+)").replace(r"\*", r"(\w+)")
        rules.append((re.compile(pattern), re.sub("[#*]", "{}", new), row.change))
    found = {}
    for name in names:
        for pattern, new, change in rules:
            match = pattern.fullmatch(name)
            if match:
                found[name] = Match(new.format(*match.groups()), change)
                break
    return found


def has_name(pattern: str, names: Iterable[str]) -> bool:
    """Whether the regular expression is found in one of them."""
    return any(re.search(pattern, name) for name in names)
