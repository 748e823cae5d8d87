"""Checks of single values of a config. Each error names the key, its value and what it may be."""

from __future__ import annotations

import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import samplers
from detectron2.solver.build import GradientClipType

from iou_d2.errors import InputError

# What training takes: key, values, and the switch without which nobody reads the key.
_CHOICES = (
    ("INPUT.RANDOM_FLIP", ("horizontal", "vertical", "none"), None),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", ("choice", "range"), None),
    (
        "INPUT.CROP.TYPE",
        ("relative", "relative_range", "absolute", "absolute_range"),
        "INPUT.CROP.ENABLED",
    ),
    ("INPUT.MASK_FORMAT", ("polygon", "bitmask"), "MODEL.MASK_ON"),
    ("SOLVER.OPTIMIZER", ("SGD", "AdamW"), None),
    ("SOLVER.WARMUP_METHOD", ("linear", "constant"), None),
    (
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
        tuple(kind.value for kind in GradientClipType),
        "SOLVER.CLIP_GRADIENTS.ENABLED",
    ),
)
_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")
_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR")
# Of Detectron2 main, and not of 0.5.
_NEW_SAMPLERS = (
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)
_NEW_SCHEDULERS = ("WarmupStepWithFixedGammaLR",)


def check_choices(cfg: CfgNode) -> None:
    """Raise an InputError where a key has a value that training does not know."""
    for key, values, switch in _CHOICES:
        if switch is None or value_of(cfg, switch):
            one_of(cfg, key, values)
    new = hasattr(samplers, "RandomSubsetTrainingSampler")
    one_of(cfg, "DATALOADER.SAMPLER_TRAIN", _SAMPLERS + _NEW_SAMPLERS * new)
    new = "NUM_DECAYS" in cfg.SOLVER
    one_of(cfg, "SOLVER.LR_SCHEDULER_NAME", _SCHEDULERS + _NEW_SCHEDULERS * new)


def check_expected_results(cfg: CfgNode) -> None:
    """Raise an InputError where TEST.EXPECTED_RESULTS has an entry that nothing can be held
    against."""
    for entry in cfg.TEST.EXPECTED_RESULTS:
        if not _is_expectation(entry):
            raise InputError(
                "TEST.EXPECTED_RESULTS has entries such as ['bbox', 'AP', 38.5, 0.2], a metric, "
                f"its value and what it may differ by, but one is {entry!r}."
            )


def _is_expectation(entry: object) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) != 4:
        return False
    is_named = all(isinstance(name, str) for name in entry[:2])
    return is_named and all(is_finite(number) for number in entry[2:])


def one_of(cfg: CfgNode, key: str, values: tuple[str, ...]) -> None:
    """Raise an InputError where the value of `key` is none of `values`."""
    value = value_of(cfg, key)
    if value not in values:
        raise InputError(f"{key} is one of {', '.join(values)}, but it is {value!r}.")


def at_least(cfg: CfgNode, key: str, low: float) -> None:
    """Raise an InputError where the value of `key` is no finite number from `low` on."""
    value = value_of(cfg, key)
    if not is_finite(value) or value < low:
        raise InputError(f"{key} is at least {low}, but it is {value}.")


def is_finite(value: object) -> bool:
    """Whether this is a number that is neither NaN nor infinite."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of a key such as "SOLVER.MAX_ITER"."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node
