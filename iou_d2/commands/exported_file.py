"""The file that --model of `iou-d2 detect` and `iou-d2 eval` names. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iou_d2.commands.threads import count_threads
from iou_d2.errors import InputError

if TYPE_CHECKING:
    from iou_d2.runtime import Detector


def open_detector(path: str) -> Detector:
    """Raises InputError where `path` is no exported model, or ONNX Runtime is not installed."""
    try:
        from iou_d2.runtime import Detector
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path} runs in ONNX Runtime, but {error.name} is not installed: run "
            '`pip install "iou_d2[runtime]"`.'
        ) from error
    return Detector(path, threads=count_threads())
