"""curves.py against closed forms."""

import math

import numpy as np
import pytest

from iou_d2.analysis import Records, binned_mean, correlation, localization_table


def make(true_iou, score, cls_score=None, pred_iou=None):
    count = len(true_iou)
    return Records(
        image_id=np.zeros(count),
        category_id=np.zeros(count),
        boxes=np.zeros((count, 4)),
        score=np.array(score, dtype=float),
        cls_score=np.array(score if cls_score is None else cls_score, dtype=float),
        pred_iou=None if pred_iou is None else np.array(pred_iou, dtype=float),
        true_iou=np.array(true_iou, dtype=float),
    )


def loop_pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    variance_x = sum((a - mean_x) ** 2 for a in x)
    return covariance / math.sqrt(variance_x * sum((b - mean_y) ** 2 for b in y))


def loop_ranks(x):
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def test_correlation_closed_form():
    # x = 1..3, y = 1, 3, 2: covariance 1, both variances 2.
    assert correlation([1, 2, 3], [1, 3, 2]) == pytest.approx((0.5, 0.5))
    x = np.linspace(0.5, 1, 30)
    assert correlation(x, 3 * x + 1) == pytest.approx((1, 1))
    pearson, spearman = correlation(x, -np.exp(9 * x))  # monotone, not linear
    assert spearman == pytest.approx(-1) and -1 < pearson < -0.5


def test_correlation_with_ties_equals_loops():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 50).astype(float), rng.random(50).round(1)
    expected = loop_pearson(x, y), loop_pearson(loop_ranks(x), loop_ranks(y))
    assert correlation(x, y) == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("x", "y"),
    [([], []), ([1], [1]), ([2, 2, 2], [1, 2, 3]), ([1, 2, 3], [0, 0, 0]), ([1, np.nan], [1, 2])],
)
def test_undefined_correlation_is_nan(x, y):
    assert all(math.isnan(r) for r in correlation(x, y))


def test_correlation_wants_equal_shapes():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        correlation([1, 2], [1, 2, 3])


def test_localization_table_takes_boxes_above_half():
    true_iou = [0.6, 0.7, 0.9, 0.5, 0.1]  # exactly 0.5 is not above it
    confidence = [0.1, 0.2, 0.4, 1.0, 1.0]
    records = make(true_iou, confidence, [0.9, 0.8, 0.6, 0, 0], pred_iou=[1, 3, 2, 0, 9])
    table = localization_table(records)
    assert table["detections"] == 3
    assert table["pearson_confidence"] == pytest.approx(1)
    assert table["pearson_cls_score"] == pytest.approx(-1)
    assert table["spearman_pred_iou"] == pytest.approx(0.5)
    assert not any("-" in key for key in table)  # Detectron2 would not print it


def test_localization_table_of_nothing():
    table = localization_table(make([], []))
    assert table.pop("detections") == 0
    assert set(table) == {
        f"{r}_{s}" for r in ("pearson", "spearman") for s in ("confidence", "cls_score")
    }
    assert all(math.isnan(value) for value in table.values())


def test_binned_mean():
    x, y = np.array([0.0, 0.4, 0.5, 1.0, 2.0]), np.array([1.0, 3, 5, 7, 100])
    means = binned_mean(x, y, np.array([0, 0.5, 1.0]))
    assert means.tolist() == [2, 6]
    assert np.isnan(binned_mean(x[:0], y[:0], np.array([0, 1.0]))).all()
