"""Detectron2's dataset mapper with errors that name the image."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image


class CheckedDatasetMapper(DatasetMapper):
    """DatasetMapper for training and test loaders: what fails on an image raises with its name.

    Built as DatasetMapper is: `CheckedDatasetMapper(cfg, is_train=True)`. Grey, palette, CMYK and
    alpha images become three 8-bit channels (alpha is left out) and are turned as EXIF says.

    Raises:
        RuntimeError: the file cannot be read, does not decode, or has more than 8 bits a channel.
        SizeMismatchError: the decoded image has another size than its annotations say.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        file_name = dataset_dict["file_name"]
        try:
            _require_8_bits(file_name)
            return super().__call__(dataset_dict)
        except SizeMismatchError:
            raise
        # Pillow raises half a dozen types, none of which need name the file.
        except Exception as error:
            raise RuntimeError(
                f"Image {file_name} (image_id {dataset_dict.get('image_id')}) cannot be used: "
                f"{type(error).__name__}: {error}"
            ) from error


def _require_8_bits(file_name: str) -> None:
    """Reads the header only. Pillow would cut all values above 255 off without a word."""
    with Image.open(file_name) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode} has more than 8 bits a channel: scale it first.")
