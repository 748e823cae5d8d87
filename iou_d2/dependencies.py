"""What iou_d2 needs and pip cannot choose, because each comes in several builds or packages."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

# Module -> where to get it.
CHOICES = {
    "torch": "Install torch and torchvision as pytorch.org says for your machine.",
    "torchvision": "Install the one that belongs to your torch, as pytorch.org says.",
    "detectron2": "Run `iou-d2 install-detectron2` for release 0.5, or the same with --git for its "
    "main branch.",
    # Four packages bring it, and two of them in one environment overwrite each other's files.
    "cv2": "Run `pip install opencv-python-headless`, or opencv-python where windows are to open.",
}
_NAMES = {"detectron2": "Detectron2", "cv2": "OpenCV"}


def missing_dependency(modules: Iterable[str] = CHOICES) -> str | None:
    """A sentence for the first of `modules`, all of CHOICES by default, that is missing; None where
    all are there. Imports none of them."""
    for module in modules:
        if find_spec(module) is None:
            name = _NAMES.get(module, module)
            return f"iou_d2 needs {name}, which is not installed. {CHOICES[module]}"
    return None
