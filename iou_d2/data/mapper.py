"""Detectron2's dataset mapper with errors that name the image."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image

from iou_d2.errors import InputError

from .images import size_fault, usable_header


class CheckedDatasetMapper(DatasetMapper):
    """DatasetMapper for training and test loaders: what fails on an image raises with its name.

    Built as DatasetMapper is: `CheckedDatasetMapper(cfg, is_train=True)`. Grey, palette, CMYK and
    alpha images become 8-bit channels as INPUT.FORMAT says (alpha is left out) and are turned as
    EXIF says; damaged EXIF data is left out.

    Raises:
        InputError: the file cannot be read, does not decode, has more than 8 bits a channel, too
            many pixels, or another size than its annotations say.
        RuntimeError: anything else that fails on an image.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        self._require_usable(dataset_dict)
        try:
            return super().__call__(dataset_dict)
        except Exception as error:
            self._require_decodable(dataset_dict)
            message = f"{_name(dataset_dict)}: {type(error).__name__}: {error}"
            raise RuntimeError(message) from error

    def _require_usable(self, dataset_dict: dict[str, Any]) -> None:
        """Reads the header only."""
        try:
            header = usable_header(dataset_dict["file_name"])
        except InputError as error:
            raise InputError(f"{_name(dataset_dict)} cannot be used: {error}") from error
        if "width" in dataset_dict and "height" in dataset_dict:
            fault = size_fault(header, dataset_dict["width"], dataset_dict["height"])
            if fault is not None:
                raise InputError(f"{_name(dataset_dict)} {fault}")

    def _require_decodable(self, dataset_dict: dict[str, Any]) -> None:
        """Tell a file that does not decode from a bug behind it, by decoding it once more."""
        try:
            read_image(dataset_dict["file_name"], format=self.image_format)
        # Pillow raises half a dozen types, none of which need name the file.
        except Exception as error:
            raise InputError(
                f"{_name(dataset_dict)} cannot be used: {type(error).__name__}: {error}"
            ) from error


def _name(dataset_dict: dict[str, Any]) -> str:
    return f"Image {dataset_dict['file_name']} (image_id {dataset_dict.get('image_id')})"
