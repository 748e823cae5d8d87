"""Detectors that know how well their boxes fit, on Detectron2.

Importing it loads nothing else. `add_iou_config`, `build_predictor`, `get_config` and `load_config`
load Detectron2, and register the backbones and detectors, when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import add_iou_config, get_config, load_config
    from .engine.checkpoint import build_predictor

__version__ = "0.1.0"
__all__ = ["add_iou_config", "build_predictor", "get_config", "load_config"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"The module iou_d2 has no attribute {name}.")
    from .dependencies import missing_dependency

    missing = missing_dependency()
    if missing:
        raise ImportError(missing)
    from . import config

    if name == "build_predictor":
        from .engine.checkpoint import build_predictor

        return build_predictor
    return getattr(config, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
