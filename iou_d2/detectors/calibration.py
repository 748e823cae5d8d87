"""The calibration that a config names: a file of `iou-d2 calibrate`."""

from __future__ import annotations

import json
from pathlib import Path

from iou_d2.errors import InputError, MissingFileError
from iou_d2.ops.calibration import Calibration, PiecewiseLinear, as_predicted


def build_calibration(cfg) -> Calibration:
    """What MODEL.CALIBRATION names; nothing where it is empty.

    Raises InputError or MissingFileError: the file is not there, or none of `iou-d2 calibrate`.
    """
    path = cfg.MODEL.CALIBRATION
    if not path:
        return as_predicted
    try:
        knots = json.loads(Path(path).read_text(encoding="utf-8"))["knots"]
        return PiecewiseLinear(tuple(knots["predicted"]), tuple(knots["true"]))
    except FileNotFoundError as error:
        raise MissingFileError(f"MODEL.CALIBRATION is {path}, which is not there.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"MODEL.CALIBRATION is {path}, which is no file of `iou-d2 calibrate`: {error!r}"
        ) from error
