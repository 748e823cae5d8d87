"""What a report is about: the results of one detector, and what is known of how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Expected(NamedTuple):
    """An entry of TEST.EXPECTED_RESULTS: `value` give or take `tolerance`."""

    task: str
    metric: str
    value: float
    tolerance: float


class Curve(NamedTuple):
    """Something that was logged: (E,) iterations, rising, and (E,) values."""

    iterations: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Subject:
    """One detector on one test set. What is not known is left empty, and the page says so.

    Attributes:
        name: how the page calls it.
        truth: COCO dict with "annotations", as `read_ground_truth` gives it.
        results: COCO detections on it, as `read_results` gives them.
        images: folder that the file names of `truth` start from.
        facts: what was trained on what, in the order of the page.
        recorded: "task/metric" -> value that the run itself recorded; None for NaN.
        expected: of TEST.EXPECTED_RESULTS.
        losses: name -> Curve. ap: of AP on the test set, in percent.
        speed: what was timed -> with its unit.
        commands: that repeat it.
        max_dets: detections of an image and class that count, best first.
        notes: sentences on what is missing or odd.
    """

    name: str
    truth: dict | None = None
    results: Sequence[dict] | None = None
    images: Path | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    recorded: Mapping[str, float | None] = field(default_factory=dict)
    expected: Sequence[Expected] = ()
    losses: Mapping[str, Curve] = field(default_factory=dict)
    ap: Curve | None = None
    speed: Mapping[str, str] = field(default_factory=dict)
    commands: Sequence[str] = ()
    max_dets: int = 100
    notes: Sequence[str] = ()
