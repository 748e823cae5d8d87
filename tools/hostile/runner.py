"""Run the tries of a surface in a process that may crash, hang or eat memory, and count.

A supervisor imports and prepares once; it forks a child that makes and judges the inputs, and forks
another one after each crash or hang, which goes on with the next try.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .judge import REFUSED, Failure, Surface, Try, watch_execution

MEMORY = 2**30  # bytes that a try may take over what the process has before the first one
SAVED_PER_KIND = 3  # inputs kept of failures that look alike
MOST_DEATHS = 20  # crashes and hangs after which a part of a run ends


@dataclass
class Count:
    """What came of the tries from `first` to before `end`."""

    surface: str
    seed: int
    tries: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: Counter = field(default_factory=Counter)  # kind -> number
    examples: dict[str, list[int]] = field(default_factory=dict)  # kind -> tries

    def fail(self, kind: str, number: int) -> bool:
        """Whether the input of this failure is to be kept."""
        self.failures[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < SAVED_PER_KIND:
            examples.append(number)
        return number in examples


def run(surface: Surface, seed: int, first: int, end: int, failures: Path) -> Count:
    """The tries `first` to before `end`; inputs that fail are kept in the folder `failures`."""
    count, start = Count(surface.name, seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"hostile-{surface.name}-") as scratch:
        prepared = surface.prepare(_empty(Path(scratch, "valid")))
        number, deaths = first, 0
        while number < end and deaths < MOST_DEATHS:
            number = _run_child(surface, prepared, count, number, end, Path(scratch), failures)
            deaths += number < end
    count.seconds = time.monotonic() - start
    return count


def _run_child(surface, prepared, count, number, end, scratch, failures) -> int:
    """Fork, and read one line a try; returns the number of the first try that is left."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _attempt_all(surface, prepared, count.seed, range(number, end), scratch, writing)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        lines = _Lines(pipe)
        while number < end:
            line = lines.next(surface.seconds)
            if not line:
                break
            _note(count, json.loads(line), surface, number, scratch, failures)
            number += 1
    if number < end and line is None:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if number == end:
        return end
    died = f"hang of more than {surface.seconds:g} s" if line is None else _death(status)
    shutil.copytree(scratch / "input", scratch / "failed" / str(number), symlinks=True)
    _note(count, {"kind": died, "text": died}, surface, number, scratch, failures)
    return number + 1


class _Lines:
    def __init__(self, pipe):
        self.pipe, self.rest = pipe, b""

    def next(self, seconds: float) -> bytes | None:
        """The next line; empty at the end, None where nothing came for so long."""
        limit = time.monotonic() + seconds
        while b"\n" not in self.rest:
            left = limit - time.monotonic()
            if left <= 0 or not select.select([self.pipe], [], [], left)[0]:
                return None
            block = self.pipe.read(65536)
            if not block:
                return b""
            self.rest += block
        line, _, self.rest = self.rest.partition(b"\n")
        return line


def _attempt_all(surface, prepared, seed, numbers, scratch, writing) -> None:
    """What the child does; it never returns."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    watch_execution()
    for number in numbers:
        outcome = attempt(surface, prepared, seed, number, scratch)
        if "kind" in outcome:  # before the next try empties the folder
            shutil.copytree(scratch / "input", scratch / "failed" / str(number), symlinks=True)
        os.write(writing, json.dumps(outcome).encode() + b"\n")
    os._exit(0)


def attempt(surface: Surface, prepared, seed: int, number: int, scratch: Path) -> dict:
    """One try: {"refused": bool}, or {"kind", "text", "input"} of a failure."""
    case = None
    folder = _empty(scratch / "input")
    try:
        case = surface.make(prepared, Try(surface.name, seed, number, folder))
        return {"refused": surface.judge(case) == REFUSED}
    except BaseException as error:  # SystemExit too: a reader must not end the process
        text = "".join(traceback.format_exception(error))[-6000:]
        return {"kind": _kind(error), "text": text, "input": repr(case)[:20000]}


def _kind(error: BaseException) -> str:
    """Failures of one kind: the type and the last place in iou_d2 or, if none, in this package."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f"{os.sep}iou_d2{os.sep}" in f.filename] or frames
    place = f"{'/'.join(ours[-1].filename.split(os.sep)[-2:])}:{ours[-1].lineno}" if ours else "?"
    if not isinstance(error, Failure):
        return f"{type(error).__name__} at {place}"
    text = re.sub(r"\d+", "#", re.sub(r"\S*/\S*", "PATH", str(error)))[:60]
    return f"{type(error).__name__} at {place}: {text!r}"


def _death(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"crash by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"end of the process with status {os.waitstatus_to_exitcode(status)}"


def _note(count, outcome, surface, number, scratch, failures) -> None:
    count.tries += 1
    if "kind" not in outcome:
        count.refused += outcome["refused"]
        return
    made = scratch / "failed" / str(number)
    if not count.fail(outcome["kind"], number):
        shutil.rmtree(made)
        return
    kept = failures / f"{surface.name}-{count.seed}-{number}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made, kept)
    replay = f"--seed {count.seed} --only {surface.name} --try {number}"
    text = f"{replay}\n\n{outcome['text']}\n\n{outcome.get('input', '')}\n"
    (kept / "FAILURE.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"FAILED {replay}: {outcome['kind']}", file=sys.stderr, flush=True)


def _empty(folder: Path) -> Path:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
