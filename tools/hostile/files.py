"""What the surfaces that read files share."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

SIDES = ((48, 32), (40, 40), (32, 56))  # width, height of the images of `write_images`


def write_images(folder: Path) -> list[str]:
    """A small PNG of each of SIDES: their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for index, (width, height) in enumerate(SIDES):
        pixels = np.random.default_rng(index).integers(0, 255, (height, width, 3), np.uint8)
        names.append(f"im{index}.png")
        Image.fromarray(pixels).save(folder / names[-1])
    return names


def copy_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)
