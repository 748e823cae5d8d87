"""PrRoI pooling of RoIs without content, absurd ones and wrong arguments, and with threads."""

import importlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from iou_d2.layers import prroi_pool, prroi_pool_reference
from prroi_pool_by_hand import LAYOUTS, gradients, make_features, make_rois

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", [prroi_pool, prroi_pool_reference])
@pytest.mark.parametrize(
    "box",
    [
        [2, 2, 2, 5],  # no width
        [5, 5, 2, 2],  # inverted
        [1, float("nan"), 3, 3],
        [1, 1, float("inf"), 3],
        [-float("inf"), 1, float("inf"), 3],
        [50, 50, 60, 60],  # outside
        [-60, -60, -50, -50],
        [3, 3, 3, 3],
    ],
)
def test_rois_without_content_give_zeros(layout, op, box):
    features = make_features((1, 18, 8, 9), layout)
    rois = torch.tensor([[0, *box], [0, 1, 1, 5, 6]], dtype=torch.float32)
    out = op(features, rois, (3, 2))
    assert (out[0] == 0).all() and (out[1] != 0).all()
    weight = torch.tensor([1.0, 0.0])[:, None, None, None]
    for gradient in gradients(op, features, rois, weight, (3, 2)):
        assert (gradient == 0).all()


def test_huge_rois_are_diluted_and_cost_no_more_than_the_map():
    features = torch.ones(1, 2, 8, 9)
    rois = torch.tensor([[0, -5e5, -5e5, 5e5, 5e5], [0, -1e30, -1e30, 1e30, 1e30]])
    out = prroi_pool(features, rois, 1)
    assert out[0].flatten().tolist() == pytest.approx([72e-12] * 2, rel=1e-5)
    assert (out[1] == 0).all()


def test_no_rois_and_no_images():
    features = make_features((2, 3, 4, 5), "contiguous").requires_grad_()
    rois = torch.zeros(0, 5, requires_grad=True)
    out = prroi_pool(features, rois, (2, 3))
    assert out.shape == (0, 3, 2, 3)
    out.sum().backward()
    assert (features.grad == 0).all() and rois.grad.shape == (0, 5)
    assert prroi_pool(torch.zeros(0, 3, 4, 5), torch.zeros(0, 5), 2).shape == (0, 3, 2, 2)
    assert prroi_pool(torch.zeros(1, 0, 4, 5), torch.zeros(2, 5), 2).shape == (2, 0, 2, 2)


@pytest.mark.parametrize(
    "error, words, change",
    [
        (
            ValueError,
            r"features must have shape \(N, C, H, W\)",
            {"features": torch.zeros(3, 4, 5)},
        ),
        (ValueError, "feature map is empty", {"features": torch.zeros(1, 2, 0, 5)}),
        (ValueError, r"rois must have shape \(R, 5\)", {"rois": torch.zeros(2, 4)}),
        (ValueError, r"rois must have shape \(R, 5\)", {"rois": torch.zeros(5)}),
        (TypeError, "must be float32 or float64", {"rois": torch.zeros(2, 5).half()}),
        (TypeError, "must be float32 or float64", {"rois": torch.zeros(2, 5).long()}),
        (TypeError, "features must be floating", {"features": torch.zeros(1, 2, 4, 5).int()}),
        (ValueError, "output size must be positive", {"output_size": (0, 2)}),
        (ValueError, "spatial_scale must be positive", {"spatial_scale": 0.0}),
        (ValueError, "spatial_scale must be positive", {"spatial_scale": float("nan")}),
        (IndexError, r"rois\[1, 0\] = 1", {"rois": torch.tensor([[0.0] * 5, [1.0] * 5])}),
        (IndexError, r"rois\[0, 0\] = -1", {"rois": torch.full((1, 5), -1.0)}),
        (IndexError, r"rois\[0, 0\] = -0.5", {"rois": torch.full((1, 5), -0.5)}),
        (IndexError, r"rois\[0, 0\] = nan", {"rois": torch.full((1, 5), float("nan"))}),
    ],
)
def test_wrong_arguments_raise_sentences(error, words, change):
    arguments = {"features": torch.zeros(1, 2, 4, 5), "rois": torch.zeros(2, 5), "output_size": 2}
    with pytest.raises(error, match=words):
        prroi_pool(**{**arguments, **change})


def test_a_batch_index_error_in_backward_does_not_write_elsewhere():
    rois = torch.tensor([[7.0, 0, 0, 1, 1]])
    with pytest.raises(IndexError, match="batch of 1 images"):
        torch.ops.iou_d2.prroi_pool_backward_features(
            torch.ones(1, 2, 2, 2), rois, (1, 2, 4, 5), False, 1.0, False
        )


def test_100000_hostile_rois():
    """Coordinates of every magnitude, order and kind; outputs are finite and bounded by the map's
    values."""
    generator = np.random.default_rng(0)
    values = np.array(
        [0, -0.0, 1, 7, 8, 0.5, 1e-45, 1e-9, 1e6, -1e6, 3e38, -3e38, np.nan, np.inf, -np.inf]
    )
    for batch in range(10):
        features = make_features((2, 5, 7, 8), LAYOUTS[batch % 3], seed=batch).requires_grad_()
        boxes = generator.normal(size=(10000, 4)) * 10.0 ** generator.integers(-4, 8, (10000, 4))
        odd = generator.random(boxes.shape) < 0.3
        boxes[odd] = generator.choice(values, odd.sum())
        rois = np.concatenate([generator.integers(2, size=(10000, 1)), boxes], 1)
        rois = torch.from_numpy(rois).float().requires_grad_()
        out = prroi_pool(features, rois, (2, 3), 0.25, bool(batch % 2))
        assert out.isfinite().all() and out.abs().max() <= features.abs().max() * (1 + 1e-5)
        for gradient in torch.autograd.grad(out.sum(), (features, rois)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_a_bit(layout):
    features = make_features((3, 70, 30, 30), layout)  # no RoI in the last
    rois = torch.cat(
        [make_rois(50, 2, 30, 30, (1, 30)), make_rois(40, 2, 30, 30, (28, 60))]
    ).float()
    weight = torch.randn(90, 70, 2, 2, generator=torch.Generator().manual_seed(5))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out = prroi_pool(features, rois, 2)
            results.append((out, *gradients(prroi_pool, features, rois, weight, 2)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_without_the_extension_there_is_one_warning_and_the_same_result():
    program = """
import sys, warnings
sys.modules["iou_d2._C"] = None
import importlib.machinery, importlib.util, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from iou_d2.layers import HAS_EXTENSION, prroi_pool
    out = prroi_pool(torch.ones(1, 2, 4, 4), torch.tensor([[0.0, 0, 0, 3, 3]]), 2)
ours = [w for w in caught if "compiled operator" in str(w.message)]
print(HAS_EXTENSION, len(ours), out.sum().item())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    extension, warned, total = result.stdout.split()
    assert (extension, warned) == ("False", "1"), result.stderr
    assert float(total) == pytest.approx(8, abs=1e-5)


def test_on_a_device_without_kernels_there_is_one_warning_and_the_same_result(monkeypatch):
    """As on a GPU, where iou_d2 was compiled for the CPU alone."""
    module = importlib.import_module("iou_d2.layers.prroi_pool")
    features = make_features((1, 2, 8, 9), "contiguous", torch.float64)
    rois = make_rois(5, 1, 8, 9, (1, 8))
    expected = prroi_pool(features, rois, 2)
    monkeypatch.setattr(module, "DEVICES", frozenset({"cuda", "meta"}))
    module._warn_of_slowness.cache_clear()
    with pytest.warns(UserWarning, match=r"operator on cpu: .* \(it was compiled without cpu\)"):
        torch.testing.assert_close(prroi_pool(features, rois, 2), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prroi_pool(features, rois, 2)
