"""Reliability against closed forms and a count in plain loops."""

import math

import numpy as np
import pytest

from iou_d2.analysis.calibration import reliability


def test_a_diagram_counted_by_hand():
    found = reliability(np.array([0.1, 0.2, 0.9, 0.7, 1.0]), np.array([0, 1, 1, 0, 1]), bins=2)
    assert found.count.tolist() == [2, 3]
    assert found.claimed == pytest.approx([0.15, 2.6 / 3])
    assert found.true == pytest.approx([0.5, 2 / 3])
    assert found.error == pytest.approx(2 / 5 * 0.35 + 3 / 5 * 0.2)


def test_scores_that_are_drawn_as_they_say_are_calibrated():
    rng = np.random.default_rng(0)
    claimed = rng.random(100_000)
    assert reliability(claimed, rng.random(100_000) < claimed).error < 0.01
    # Of p the square is true: the mean of p - p**2 over [0, 1].
    assert reliability(claimed, claimed**2).error == pytest.approx(1 / 6, abs=2e-3)


def test_the_error_is_that_of_a_loop():
    rng = np.random.default_rng(1)
    claimed, true = rng.random(500) ** 3, rng.random(500)
    error = 0.0
    for low in range(10):
        held = [(c, t) for c, t in zip(claimed, true) if low <= c * 10 < low + 1]
        error += abs(sum(c for c, _ in held) - sum(t for _, t in held)) / 500
    assert reliability(claimed, true).error == pytest.approx(error)


def test_nothing_and_what_is_no_probability():
    empty = reliability(np.zeros(0), np.zeros(0))
    assert math.isnan(empty.error) and empty.count.sum() == 0
    for value in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="no probability"):
            reliability(np.array([value]), np.zeros(1))
    with pytest.raises(ValueError, match="one shape"):
        reliability(np.zeros(2), np.zeros(3))
