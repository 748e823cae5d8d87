from __future__ import annotations

import numpy as np
import pytest

from iou_d2.analysis.calibration import reliability
from iou_d2.analysis.isotonic import fit_knots


def pooled(values, counts):
    """Pool adjacent violators, as textbooks have it: [(mean, weight, members)]."""
    blocks = []
    for value, count in zip(values, counts):
        blocks.append([value, count, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (a, m, i), (b, n, j) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n, i + j]]
    return blocks


def test_knots_are_those_of_pooled_violators():
    generator = np.random.default_rng(0)
    claimed = generator.random(200)
    true = np.clip(claimed**2 + generator.normal(0, 0.3, 200), 0, 1)
    order = claimed.argsort()
    groups = np.array_split(order, 20)  # 10 in each
    means = [[values[group].mean() for group in groups] for values in (claimed, true)]
    blocks = pooled(means[1], [10] * 20)
    assert len(blocks) < 20
    knots = fit_knots(claimed, true)
    assert knots.true == pytest.approx([value for value, _, _ in blocks])
    ends = np.cumsum([0] + [members for _, _, members in blocks])
    expected = [np.mean(means[0][a:b]) for a, b in zip(ends, ends[1:])]
    assert knots.claimed == pytest.approx(expected)


def test_it_undoes_a_monotone_bias():
    generator = np.random.default_rng(0)
    true = generator.random(20000)
    claimed = np.sqrt(true)  # biased high, as the IoUs of untrained negatives are
    knots = fit_knots(claimed[::2], true[::2])
    corrected = np.interp(claimed[1::2], *knots)
    before, after = (reliability(x, true[1::2]).error for x in (claimed[1::2], corrected))
    assert before == pytest.approx(1 / 6, abs=0.01) and after < 0.005


def test_claims_that_are_all_alike_give_one_knot():
    knots = fit_knots(np.full(7, 0.6), np.array([0, 0, 0, 0, 0, 0.7, 0.7]))
    assert knots.claimed == pytest.approx([0.6]) and knots.true == pytest.approx([0.2])
    knots = fit_knots(np.array([0.2, 0.8]), np.array([0.9, 0.1]))  # falls
    assert knots.claimed == pytest.approx([0.5]) and knots.true == pytest.approx([0.5])


def test_what_cannot_be_fitted_is_said():
    for claimed, true in (([], []), ([0.1], [0.1, 0.2]), ([1.5], [0.1]), ([np.nan], [0.1])):
        with pytest.raises(ValueError):
            fit_knots(np.array(claimed), np.array(true))
