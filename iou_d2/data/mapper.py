"""Detectron2's dataset mapper with errors that name the image."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode

from iou_d2.errors import InputError
from iou_d2.resize import for_any_shape

from .augmentation import build_augmentations
from .images import size_fault, usable_header


class CheckedDatasetMapper(DatasetMapper):
    """DatasetMapper for training and test loaders: what fails on an image raises with its name.

    Built as DatasetMapper is: `CheckedDatasetMapper(cfg, is_train=True)`. Grey, palette, CMYK and
    alpha images become 8-bit channels as INPUT.FORMAT says (alpha is left out) and are turned as
    EXIF says; damaged EXIF data is left out. What INPUT.AUGMENTATIONS names takes the place of
    Detectron2's resize and flip, and sees the boxes of the image.

    Raises:
        InputError: the file cannot be read, does not decode, has more than 8 bits a channel, too
            many pixels, or another size than its annotations say.
        RuntimeError: anything else that fails on an image.
    """

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        arguments = super().from_config(cfg, is_train)
        if cfg.INPUT.get("AUGMENTATIONS"):  # which a config of Detectron2 alone has not
            arguments["augmentations"] = build_augmentations(cfg, is_train)
        arguments["augmentations"] = [for_any_shape(x) for x in arguments["augmentations"]]
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        self._require_usable(dataset_dict)
        try:
            return DatasetMapper.__call__(self._seeing(boxes_of(dataset_dict)), dataset_dict)
        except Exception as error:
            self._require_decodable(dataset_dict)
            message = f"{_name(dataset_dict)}: {type(error).__name__}: {error}"
            raise RuntimeError(message) from error

    def _seeing(self, boxes: np.ndarray) -> CheckedDatasetMapper:
        """This mapper with augmentations that know `boxes` (G, 4); Detectron2 shows them none."""
        mapper = copy.copy(self)
        mapper.augmentations = functools.partial(_augment, self.augmentations, boxes)
        return mapper

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


def truth_mapper(cfg: CfgNode) -> Callable[[dict], dict]:
    """The mapper of test images that keeps their objects, but for crowds, as "instances" of boxes
    and classes at the size of the network input; an image without annotations has none. Proposals
    from files are as many as in a test."""
    mapper, of_tests = (CheckedDatasetMapper(cfg, is_train=x) for x in (True, False))
    mapper.augmentations, mapper.proposal_topk = of_tests.augmentations, of_tests.proposal_topk
    mapper.use_instance_mask = mapper.use_keypoint = mapper.recompute_boxes = False
    return functools.partial(_annotated, mapper)


def _annotated(mapper: CheckedDatasetMapper, dataset_dict: dict) -> dict:
    return mapper({"annotations": [], **dataset_dict})


def boxes_of(dataset_dict: dict[str, Any]) -> np.ndarray:
    """The boxes of an image without those of crowds: (G, 4) XYXY; (0, 4) without annotations."""
    boxes = [
        BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS)
        for x in dataset_dict.get("annotations", [])
        if x.get("iscrowd", 0) == 0
    ]
    return np.array(boxes, dtype=float).reshape(-1, 4)


def _augment(augmentations: T.AugmentationList, boxes: np.ndarray, image: T.AugInput):
    image.boxes = boxes
    return augmentations(image)


def _name(dataset_dict: dict[str, Any]) -> str:
    return f"Image {dataset_dict['file_name']} (image_id {dataset_dict.get('image_id')})"
