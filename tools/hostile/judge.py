"""What passes: a result that an independent check confirms, or a refusal in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from iou_d2.errors import InputError

from .mutate import Plan, plan

READ, REFUSED = "read", "refused"
LONGEST_SENTENCE = 3000
# What a file that is only read must never do.
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
_seen: list[str] = []


class Failure(AssertionError):
    """A surface did what it must not."""


class Try(NamedTuple):
    """One try of a surface: all that it draws is drawn from these."""

    surface: str
    seed: int
    number: int
    folder: Path  # empty; what is written here is kept if the try fails

    @property
    def rng(self) -> Random:
        return Random(f"{self.seed} {self.surface} {self.number}")

    @property
    def plan(self) -> Plan:
        return plan(f"{self.seed} {self.surface}", self.number)


@dataclass(frozen=True)
class Surface:
    """What is attacked.

    Args:
        name: as in --only.
        what: for the table, with what is checked.
        tries: of a whole run.
        prepare: called once in each process with an empty folder; its result goes to `make`.
        make: (prepared, the try) -> an input.
        judge: feeds the input and returns READ or REFUSED, or raises; any error is a failure.
        seconds: a longer try counts as a hang.
        chunks: parts of a run that other processes may take.
    """

    name: str
    what: str
    tries: int
    prepare: Callable[[Path], Any]
    make: Callable[[Any, Try], Any]
    judge: Callable[[Any], str]
    seconds: float = 10.0
    chunks: int = 1


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Failure(message)


def refused(error: InputError, *names: str) -> str:
    """REFUSED, if the error is one line, not too long, that holds one of `names`."""
    text = str(error)
    require("\n" not in text.strip(), f"the refusal has several lines: {text[:300]!r}")
    require(len(text) <= LONGEST_SENTENCE, f"the refusal has {len(text)} characters: {text[:300]}")
    require(any(name in text for name in names), f"the refusal names none of {names}: {text[:300]}")
    return REFUSED


def watch_execution() -> None:
    """From now on `require_nothing_ran` knows of every process that this one starts."""

    def hook(event: str, arguments: tuple) -> None:
        if event in _FORBIDDEN:
            _seen.append(event)

    sys.addaudithook(hook)


def require_nothing_ran(canary: Path | None = None) -> None:
    ran, _seen[:] = list(_seen), []
    require(not ran, f"reading started a process: {ran}")
    if canary is not None and canary.exists():
        canary.unlink()
        raise Failure("reading ran what stands in the file")
