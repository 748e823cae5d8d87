"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from detectron2.utils import comm

from iou_d2.errors import InputError

NAME = ".lock"
_HELD_BY_ANOTHER = {errno.EACCES, errno.EAGAIN}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO}
# The kernel gives a process its own lock a second time, and drops it at the first close.
_held_here: set[Path] = set()


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Hold `folder`, which is made where it is not there; of several processes the main one does.

    The kernel drops the lock when the process ends, however it does. The file stays: to remove it
    would let two runs lock two files of one name. Where the file system has no locks, a warning
    says so.

    Raises:
        InputError: another run holds it; a sentence with its host, process and start. Or it is "".
    """
    if not os.fspath(folder):
        raise InputError("OUTPUT_DIR is empty: name a folder for what the run writes.")
    if not comm.is_main_process():
        yield
        return
    path = Path(folder).resolve() / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    if path in _held_here:
        raise InputError(_refusal(folder, path))
    with open(path, "a+") as file:
        _hold(file, folder, path)
        _held_here.add(path)
        try:
            yield
        finally:
            _held_here.discard(path)
            file.truncate(0)


def _hold(file, folder: str | os.PathLike, path: Path) -> None:
    try:
        # Not flock: data loaders that outlive a killed run would inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_BY_ANOTHER:
            raise InputError(_refusal(folder, path)) from None
        if error.errno not in _UNSUPPORTED:
            raise
        logging.getLogger(__name__).warning(
            f"{folder} lies where files cannot be locked: see to it that no other run writes there."
        )
    file.truncate(0)
    start = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {start}")
    file.flush()


def _refusal(folder: str | os.PathLike, path: Path) -> str:
    holder = path.read_text(errors="replace").strip() if path not in _held_here else ""
    holder = holder or "another run"
    return (
        f"{folder} is in use by {holder}. Give this run another OUTPUT_DIR, or wait for that one."
    )
