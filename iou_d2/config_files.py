"""Where the configs that come with iou_d2 lie, and how a name finds one."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from .errors import MissingFileError


def config_folder() -> Path:
    """In the package where iou_d2 was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Names of the configs that come with iou_d2, such as "quick/vfnet_own_data"."""
    folder = config_folder()
    paths = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in paths)


def find_config(name: str | os.PathLike) -> str:
    """The path of a config: `name` itself where it is a file, or else the config of that name, with
    or without .yaml, that comes with iou_d2.

    Raises:
        MissingFileError: a sentence with the nearest names.
    """
    name = os.fspath(name)
    if os.path.isfile(name):
        return name
    names = config_names()
    wanted = name.removesuffix(".yaml")
    if wanted in names:
        return str(config_folder() / f"{wanted}.yaml")
    # A path that is right in a checkout, typed elsewhere.
    tail = wanted.replace(os.sep, "/").rpartition("configs/")[2]
    if tail in names:
        raise MissingFileError(
            f"There is no config file {name}, but one comes with iou_d2: give its name, {tail}."
        )
    near = ", ".join(difflib.get_close_matches(tail, names, n=3, cutoff=0.0))
    raise MissingFileError(
        f"There is no config file {name}. The nearest of those that come with iou_d2: {near}."
    )
