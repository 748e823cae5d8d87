"""Where commands write: checked before long work, and written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from iou_d2.errors import InputError


def make_folder(path: str | os.PathLike) -> Path:
    """The folder for what a command writes, made where it is not there.

    Raises InputError where a file has that name, or one of its parents'.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--output {path} is no folder: {error.filename} is a file.") from error
    except FileNotFoundError as error:  # of a file system that makes none, such as /proc
        raise InputError(f"--output {path} cannot be made.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {path} cannot be written to.")
    return folder


def check_output_file(path: str | os.PathLike) -> None:
    """Make the folder of the file `path`. Raises InputError where no such file can be written."""
    if os.path.isdir(path):
        raise InputError(f"--output {path} is a folder: give the name of a file.")
    make_folder(Path(os.path.abspath(path)).parent)


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write the file `path` beside its place, and rename it when it is complete."""
    unfinished = f"{os.fspath(path)}.{os.getpid()}.unfinished"
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)
