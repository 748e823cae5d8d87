"""Which files a dataset may be read from: those in its folder, links followed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from iou_d2.errors import InputError

from .cleaning import Trust


@dataclass(frozen=True)
class Bounds:
    """The folder that a dataset stays in, unless `trust.paths` is set.

    Attributes:
        source: what leads to the files, for the errors: data.yaml, or the folder itself.
    """

    source: Path
    folder: Path
    trust: Trust

    def require(self, path: Path) -> None:
        """Raise InputError where a file or folder, links followed, lies outside."""
        if self.trust.paths:
            return
        real = path.resolve()
        if not real.is_relative_to(self.folder.resolve()):
            raise InputError(
                f"{self.source} leads to {real}, which is outside of its folder. Set "
                "DATASETS.TRUST_PATHS True if you trust the data."
            )

    def require_files(self, files: Iterable[Path]) -> None:
        """`require` for many files: a folder that several lie in is looked at once."""
        if self.trust.paths:
            return
        folders = set()
        for file in files:
            if file.parent not in folders:
                self.require(file.parent)
                folders.add(file.parent)
            if file.is_symlink():
                self.require(file)

    def files_below(self, folder: Path) -> list[Path]:
        """The files in `folder` and below it, sorted, but for hidden ones.

        Linked folders are read after all others, and each folder once: so links in a circle end.
        Raises InputError where one leads outside.
        """
        self.require(folder)
        found: list[Path] = []
        seen: set[str] = set()
        waiting = [folder]
        while waiting:
            for parent, folders, files in os.walk(waiting.pop(0)):
                real = os.path.realpath(parent)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = sorted(filter(_is_shown, folders))
                found += [Path(parent, name) for name in filter(_is_shown, files)]
                # os.walk names linked folders, but does not enter them.
                for link in (Path(parent, name) for name in folders):
                    if link.is_symlink():
                        self.require(link)
                        waiting.append(link)
        return sorted(found)


def _is_shown(name: str) -> bool:
    return not name.startswith(".")
