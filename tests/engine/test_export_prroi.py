"""Precise RoI pooling as a graph: against the operator, its autograd and finite differences."""

import pytest
import torch

from iou_d2.detectors.pooler import PrRoIPooler
from iou_d2.engine.export import prroi_graph
from iou_d2.engine.export.pooling import require_pooler
from iou_d2.engine.export.prroi_graph import (
    box_gradient,
    feature_table,
    place,
    pool,
    pool_with_slopes,
)
from iou_d2.errors import InputError
from iou_d2.layers import prroi_pool

SCALES, BINS = (1 / 4, 1 / 8), 3
NAMES = ["fine", "coarse", "boxes", "image", "level", "upstream"]


class PoolAndGradient(torch.nn.Module):
    def __init__(self, aligned=True):
        super().__init__()
        self.aligned = aligned

    def forward(self, fine, coarse, boxes, image, level, upstream):
        table = feature_table([fine, coarse], SCALES)
        rois = place(table, boxes, image, level, BINS, self.aligned)
        pooled, slopes = pool_with_slopes(table, rois)
        return pool(table, rois), box_gradient(rois, slopes, upstream), pooled


def example(images, count, height, width, dtype=torch.float32):
    """Boxes of all sizes, some out of the map, and of images from -1, which is none, on."""
    corner = torch.rand(count, 2, dtype=dtype) * 120 - 20
    boxes = torch.cat([corner, corner + torch.rand(count, 2, dtype=dtype) ** 3 * 150], dim=1)
    return (
        torch.randn(images, 3, height, width, dtype=dtype),
        torch.randn(images, 3, height // 2, width // 2, dtype=dtype),
        boxes,
        torch.randint(-1, images, (count,)),
        torch.randint(2, (count,)),
        torch.randn(count, 3, BINS, BINS, dtype=dtype),
    )


ODD_BOXES = (
    (-1e9, -1e9, 1e9, 1e9),
    (-1e30, 0, 1e30, 10),
    (5, 5, 5, 9),
    (9, 5, 5, 9),
    (float("nan"), 0, 9, 9),
    (0, 0, float("inf"), 9),
    (500, 500, 600, 600),
    (-50, -50, -20, -20),
    (10, 10, 10.001, 10.001),
    (10, 3, 10.00001, 90),
    (4, 8, 16, 40),
)


def odd_example(dtype):
    count = len(ODD_BOXES)
    fine, coarse, _, _, level, upstream = example(2, count, 20, 31, dtype)
    boxes = torch.tensor(ODD_BOXES, dtype=dtype)
    return fine, coarse, boxes, torch.arange(count) % 2, level, upstream


def by_operator(fine, coarse, boxes, image, level, upstream, aligned=True):
    """One box at a time in float64: pooled values and the gradient that autograd gives."""
    maps, upstream = [fine.double(), coarse.double()], upstream.double()
    boxes = boxes.double().requires_grad_()
    pooled = torch.zeros_like(upstream)
    for index in range(len(boxes)):
        if 0 <= image[index] < len(fine):
            roi = torch.cat([image[index, None].double(), boxes[index]])[None]
            scale = SCALES[level[index]]
            pooled[index] = prroi_pool(maps[level[index]], roi, (BINS, BINS), scale, aligned)[0]
    (gradient,) = torch.autograd.grad((pooled * upstream).sum(), boxes)
    return pooled.detach(), gradient, pooled.detach()


def assert_same(got, expected, **tolerance):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours).double(), theirs.double(), **tolerance)


@pytest.mark.parametrize("aligned", (True, False))
@pytest.mark.parametrize("pixels", (2**14, 40))
def test_is_the_operator_and_its_gradient(aligned, pixels, monkeypatch):
    """All boxes at a time, and one at a time."""
    monkeypatch.setattr(prroi_graph, "PIXELS_AT_ONCE", pixels)
    torch.manual_seed(0)
    for inputs in (example(2, 60, 20, 31, torch.float64), odd_example(torch.float64)):
        found = PoolAndGradient(aligned)(*inputs)
        assert found[1].abs().max() > 0.1
        assert_same(found, by_operator(*inputs, aligned), rtol=1e-9, atol=1e-9)


def test_float32_is_as_exact_for_tiny_boxes():
    torch.manual_seed(1)
    for inputs in (example(2, 60, 20, 31), odd_example(torch.float32)):
        assert_same(PoolAndGradient()(*inputs), by_operator(*inputs), rtol=1e-5, atol=1e-5)


def test_bins_that_are_no_square_are_refused():
    require_pooler(PrRoIPooler(3, SCALES), "KEY")
    with pytest.raises(InputError, match="A pooler of 3 x 2 bins cannot be exported"):
        require_pooler(PrRoIPooler((3, 2), SCALES), "KEY")


def test_gradient_is_that_of_finite_differences():
    torch.manual_seed(2)
    inputs = list(example(2, 20, 20, 31, torch.float64))
    boxes, upstream, step = inputs[2], inputs[5], 1e-6
    gradient = PoolAndGradient()(*inputs)[1]
    for side in range(4):
        moved = []
        for sign in (1, -1):
            inputs[2] = boxes + sign * step * torch.eye(4, dtype=torch.float64)[side]
            moved.append((PoolAndGradient()(*inputs)[0] * upstream).sum(dim=(1, 2, 3)))
        difference = (moved[0] - moved[1]) / (2 * step)
        torch.testing.assert_close(gradient[:, side], difference, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(ONNX Runtime's session, traced module)"""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("prroi") / "model.onnx"
    inputs = example(2, 5, 20, 31)
    axes = {name: {0: f"{name}0"} for name in NAMES}
    axes |= {name: {0: "n", 2: f"{name}2", 3: f"{name}3"} for name in NAMES[:2]}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(prroi_graph, "PIXELS_AT_ONCE", 2000)
        graph = PoolAndGradient().eval()
        torch.onnx.export(
            graph,
            inputs,
            path,
            input_names=NAMES,
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
        traced = torch.jit.trace(graph, inputs, check_trace=False)
    return onnxruntime.InferenceSession(path), traced


@pytest.mark.parametrize("shape", ((2, 5, 20, 31), (1, 0, 20, 30), (3, 70, 31, 50), (1, 1, 8, 8)))
def test_graphs_give_the_same_at_any_size(exported, shape):
    session, traced = exported
    torch.manual_seed(3)
    inputs = example(*shape)
    expected = PoolAndGradient()(*inputs)
    assert expected[0].shape == (shape[1], 3, BINS, BINS) and expected[1].shape == (shape[1], 4)
    assert_same(traced(*inputs), expected)
    named = {name: value.numpy() for name, value in zip(NAMES, inputs)}
    assert_same(session.run(None, named), expected, rtol=1e-4, atol=1e-5)
