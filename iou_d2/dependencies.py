"""What iou_d2 needs and pip cannot choose, because each comes in several builds or packages."""

from __future__ import annotations

from importlib.util import find_spec

# Module -> where to get it.
_CHOICES = {
    "torch": "Install torch and torchvision as pytorch.org says for your machine.",
    "torchvision": "Install the one that belongs to your torch, as pytorch.org says.",
    "detectron2": "Run `iou-d2 install-detectron2` for release 0.5, or the same with --git for its "
    "main branch.",
    # Four packages bring it, and two of them in one environment overwrite each other's files.
    "cv2": "Run `pip install opencv-python-headless`, or opencv-python where windows are to open.",
}
_NAMES = {"detectron2": "Detectron2", "cv2": "OpenCV"}


def missing_dependency() -> str | None:
    """A sentence for the first that is missing, None where all are there. Imports none of them."""
    for module, remedy in _CHOICES.items():
        if find_spec(module) is None:
            return f"iou_d2 needs {_NAMES.get(module, module)}, which is not installed. {remedy}"
    return None
