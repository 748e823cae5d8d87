"""Give this Python environment a Detectron2.

An importable Detectron2 (upstream main, your own build) is left alone. Otherwise the Python part of
Detectron2 0.5 is taken from PyPI (the sdist detectron2-cdo, checked by sha256), mended for current
NumPy, Pillow, setuptools and torch and for the absence of compiled operators, and installed as a
pure-Python wheel named detectron2. With --git, upstream main is built from its repository instead.

    iou-d2 install-detectron2 [--git]

Needs torch and pip, and no other part of iou_d2.
"""

from __future__ import annotations

import argparse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--git", action="store_true", help="build upstream main instead of 0.5")
    return parser.parse_args(argv)
