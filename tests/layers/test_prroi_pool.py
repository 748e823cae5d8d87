"""PrRoI pooling against a float64 closed form in NumPy, torch's own checkers, and hostile input."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from iou_d2.layers import HAS_EXTENSION, PrRoIPool, prroi_pool, prroi_pool_reference

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
LAYOUTS = ("contiguous", "channels_last", "strided")


def antiderivative(t):
    """Integral of max(0, 1 - |s|) from minus infinity to t."""
    if t <= -1:
        return 0.0
    if t <= 0:
        return (t + 1) ** 2 / 2
    return 1 - (1 - t) ** 2 / 2 if t < 1 else 1.0


def oracle(features, rois, size, scale=1.0, aligned=False):
    """Eq. 3 of the paper, one RoI, bin and pixel at a time, in float64."""
    features, rois = np.asarray(features, np.float64), np.asarray(rois, np.float64)
    out = np.zeros((len(rois), features.shape[1], *size))
    for r, (n, *box) in enumerate(rois):
        x1, y1, x2, y2 = (c * scale - 0.5 * aligned for c in box)
        if not (np.isfinite(box).all() and x2 > x1 and y2 > y1):
            continue
        weights = []
        for start, end, bins, pixels in (
            (y1, y2, size[0], features.shape[2]),
            (x1, x2, size[1], features.shape[3]),
        ):
            edges = [start + (end - start) * k / bins for k in range(bins + 1)]
            table = np.array(
                [[antiderivative(e - i) for i in range(pixels)] for e in edges], np.float64
            )
            weights.append((table[1:] - table[:-1]) / ((end - start) / bins))
        out[r] = weights[0] @ features[int(n)] @ weights[1].T
    return out


def make_features(shape, layout, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    if layout == "strided":
        wide = torch.randn(n, c + 2, h, 2 * w, dtype=dtype, generator=generator)
        return wide[:, 1:-1, :, ::2]
    features = torch.randn(shape, dtype=dtype, generator=generator)
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    return features


def make_rois(count, images, height, width, sides, seed=0, dtype=torch.float64):
    """RoIs with sides log-uniform between two numbers, inside, across and outside the map's
    border."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (math.log(s) for s in sides)
    side = torch.exp(low + torch.rand(count, 2, generator=generator) * (high - low))
    center = torch.rand(count, 2, generator=generator) * 1.4 - 0.2
    center = center * torch.tensor([width, height])
    image = torch.randint(images, (count, 1), generator=generator)
    return torch.cat([image, center - side / 2, center + side / 2], 1).to(dtype)


def gradients(op, features, rois, weight, *args):
    features = features.detach().requires_grad_()
    rois = rois.detach().requires_grad_()
    return torch.autograd.grad((op(features, rois, *args) * weight).sum(), (features, rois))


def test_the_extension_is_built():
    assert HAS_EXTENSION


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 16, 83])
@pytest.mark.parametrize("aligned", [False, True])
def test_forward_equals_the_closed_form(layout, channels, aligned):
    features = make_features((2, channels, 13, 17), layout, torch.float64)
    rois = make_rois(40, 2, 26, 34, (0.02, 200))
    out = prroi_pool(features, rois, (3, 5), 0.5, aligned)
    want = oracle(features, rois, (3, 5), 0.5, aligned)
    np.testing.assert_allclose(out.numpy(), want, rtol=0, atol=1e-10)
    single = prroi_pool(features.float(), rois.float(), (3, 5), 0.5, aligned)
    want = oracle(features.float(), rois.float(), (3, 5), 0.5, aligned)
    np.testing.assert_allclose(single.numpy(), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("op", [prroi_pool, prroi_pool_reference])
def test_published_values(op):
    """The 2 x 2 and 4 x 4 maps of mmcv's test of the published kernel."""
    small = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    rois = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]])
    out = op(small, rois, (2, 2), 1.0)
    want = torch.tensor([[[[1.75, 2.25], [2.75, 3.25]]]])
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("op", [prroi_pool, prroi_pool_reference])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_finite_differences_of_the_closed_form(layout, op):
    """Also at integer edges, where the surface has kinks but a bin's value is still smooth."""
    features = make_features((1, 3, 8, 9), layout, torch.float64)
    rois = make_rois(6, 1, 8, 9, (0.5, 12))
    whole = torch.tensor([[0, 1, 2, 5, 6], [0, 0, 0, 8, 7], [0, -1, 3, 3, 8.0]])
    rois = torch.cat([rois, whole.double()])
    weight = torch.randn(len(rois), 3, 2, 3, generator=torch.Generator().manual_seed(1)).double()
    got_features, got_rois = gradients(op, features, rois, weight, (2, 3))
    value = lambda f, r: (oracle(f, r, (2, 3)) * weight.numpy()).sum()  # noqa: E731
    step = 1e-6
    for index in np.ndindex(*rois[:, 1:].shape):
        moved = [rois.numpy().copy() for _ in range(2)]
        moved[0][index[0], index[1] + 1] += step
        moved[1][index[0], index[1] + 1] -= step
        slope = (value(features, moved[0]) - value(features, moved[1])) / (2 * step)
        assert abs(got_rois[index[0], index[1] + 1].item() - slope) < 2e-5 * max(1, abs(slope))
    assert (got_rois[:, 0] == 0).all()
    for index in [(0, 0, 0, 0), (0, 1, 3, 4), (0, 2, 7, 8), (0, 1, 5, 2)]:
        unit = np.zeros(features.shape)
        unit[index] = 1  # the op is linear in the features
        assert got_features[index].item() == pytest.approx(value(unit, rois), abs=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 18, 70])
def test_float32_gradients_equal_those_of_the_reference_in_float64(layout, channels):
    features = make_features((2, channels, 20, 24), layout)
    rois = make_rois(30, 2, 20, 24, (0.5, 40)).float()
    weight = torch.randn(30, channels, 7, 4, generator=torch.Generator().manual_seed(2))
    args = ((7, 4), 0.8, True)
    got = gradients(prroi_pool, features, rois, weight, *args)
    want = gradients(prroi_pool_reference, features.double(), rois.double(), weight.double(), *args)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_large_rois_equal_the_closed_form(layout):
    """They go by way of a table of integrals."""
    features = make_features((2, 11, 40, 50), layout, torch.float64) + 3
    rois = make_rois(60, 2, 40, 50, (30, 3000))
    weight = torch.randn(60, 11, 2, 3, generator=torch.Generator().manual_seed(3)).double()
    out = prroi_pool(features, rois, (2, 3))
    np.testing.assert_allclose(out.numpy(), oracle(features, rois, (2, 3)), rtol=0, atol=1e-10)
    got = gradients(prroi_pool, features, rois, weight, (2, 3))
    want = gradients(prroi_pool_reference, features, rois, weight, (2, 3))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_table_does_not_spread_a_nan():
    features = make_features((1, 9, 40, 50), "contiguous", torch.float64)
    rois = torch.tensor([[0.0, 5, 5, 45, 38]]).double().repeat(80, 1)
    clean = prroi_pool(features, rois, 2)
    features[0, 2, 0, 0] = float("nan")
    features[0, 3, 39, 49] = float("inf")
    torch.testing.assert_close(prroi_pool(features, rois, 2), clean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout):
    features = make_features((2, 2, 6, 7), layout, torch.float64).requires_grad_()
    rois = torch.tensor(
        [[0, 0.3, 0.6, 4.2, 3.7], [1, -1.4, 1.3, 2.6, 8.2], [1, 2.2, 2.2, 2.4, 2.7]]
    )
    rois = rois.double()
    assert torch.autograd.gradcheck(lambda f: prroi_pool(f, rois, (2, 3), 0.9, True), features)
    boxes = rois[:, 1:].clone().requires_grad_()
    fixed = features.detach()

    def of_boxes(b):
        return prroi_pool(fixed, torch.cat([rois[:, :1], b], 1), (2, 3), 0.9, True)

    assert torch.autograd.gradcheck(of_boxes, boxes)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_opcheck(layout, needs):
    features = make_features((2, 3, 5, 6), layout).requires_grad_(needs[0])
    rois = make_rois(4, 2, 5, 6, (1, 5)).float().requires_grad_(needs[1])
    torch.library.opcheck(torch.ops.iou_d2.prroi_pool.default, (features, rois, 0.5, 2, 3, True))


def test_opcheck_of_the_backward_ops():
    features = make_features((2, 3, 5, 6), "channels_last")
    rois = make_rois(4, 2, 5, 6, (1, 5)).float()
    out = prroi_pool(features, rois, 2)
    ops = torch.ops.iou_d2
    args = (out, rois, features.shape, True, 1.0, False)
    torch.library.opcheck(ops.prroi_pool_backward_features.default, args)
    args = (out, features, out, rois, 1.0, False)
    torch.library.opcheck(ops.prroi_pool_backward_rois.default, args)


def test_only_the_needed_backward_runs():
    def ops_run(features, rois):
        with torch.profiler.profile() as profile:
            prroi_pool(features, rois, 2).sum().backward()
        return {e.key for e in profile.key_averages() if e.key.startswith("iou_d2::prroi_pool_b")}

    features, rois = (
        make_features((1, 2, 5, 5), "contiguous"),
        make_rois(3, 1, 5, 5, (1, 4)).float(),
    )
    to_rois, to_features = (
        "iou_d2::prroi_pool_backward_rois",
        "iou_d2::prroi_pool_backward_features",
    )
    assert ops_run(features, rois.clone().requires_grad_()) == {to_rois}
    assert ops_run(features.clone().requires_grad_(), rois) == {to_features}


def test_a_second_derivative_raises_a_sentence():
    features = make_features((1, 2, 5, 5), "contiguous").requires_grad_()
    rois = make_rois(3, 1, 5, 5, (1, 4)).float().requires_grad_()
    first = torch.autograd.grad(prroi_pool(features, rois, 2).sum(), rois, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_compile_without_graph_breaks():
    """Backend aot_eager: traced with fake tensors and autograd, without the time of code
    generation."""
    layer = PrRoIPool((3, 2), 0.5, aligned=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (4, 7):
        features = make_features((1, 3, 8, 9), "channels_last").requires_grad_()
        rois = make_rois(count, 1, 16, 18, (2, 20)).float().requires_grad_()
        want, got = layer(features, rois), compiled(features, rois)
        torch.testing.assert_close(got, want)
        inputs = (features, rois)
        pairs = (torch.autograd.grad(out.square().sum(), inputs) for out in (got, want))
        for a, b in zip(*pairs):
            torch.testing.assert_close(a, b)


def test_export_keeps_the_operator():
    layer = PrRoIPool(2, aligned=True)
    features, rois = (
        make_features((1, 3, 8, 9), "contiguous"),
        make_rois(4, 1, 8, 9, (2, 6)).float(),
    )
    shapes = ({}, {0: torch.export.Dim("boxes")})
    program = torch.export.export(layer, (features, rois), dynamic_shapes=shapes)
    assert "iou_d2.prroi_pool" in program.graph_module.code
    more = make_rois(9, 1, 8, 9, (2, 6)).float()
    torch.testing.assert_close(program.module()(features, more), layer(features, more))


@pytest.mark.skipif(
    TORCH < (2, 8), reason="The exporter before torch 2.8 does not say that it is one"
)
def test_onnx_export_agrees_in_onnxruntime(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    layer = PrRoIPool((3, 2), 0.5, aligned=True).eval()
    features, rois = (
        make_features((2, 3, 8, 9), "contiguous"),
        make_rois(5, 2, 16, 18, (2, 20)).float(),
    )
    path = str(tmp_path / "pool.onnx")
    shapes = ({}, {0: torch.export.Dim("boxes")})
    torch.onnx.export(
        layer, (features, rois), path, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    more = torch.cat([make_rois(9, 2, 16, 18, (2, 20), seed=4).float(), rois])
    more[0, 3] = more[0, 1]
    got = session.run(None, dict(zip(names, (features.numpy(), more.numpy()))))[0]
    np.testing.assert_allclose(got, layer(features, more).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_summed_in_float32(dtype):
    features = make_features((1, 4, 30, 30), "channels_last").to(dtype)
    rois = make_rois(20, 1, 30, 30, (2, 30)).float()
    out = prroi_pool(features, rois, 2)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, prroi_pool(features.float(), rois, 2).to(dtype))
    grads = gradients(prroi_pool, features, rois, 1, 2)
    assert [g.dtype for g in grads] == [dtype, torch.float32]


def test_autocast_changes_nothing():
    features, rois = (
        make_features((1, 4, 9, 9), "contiguous"),
        make_rois(9, 1, 9, 9, (1, 9)).float(),
    )
    for op in (prroi_pool, prroi_pool_reference):
        want = gradients(op, features, rois, 1, (2, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = op(features.requires_grad_(), rois.requires_grad_(), (2, 2))
        assert out.dtype == torch.float32
        got = torch.autograd.grad(out.sum(), (features, rois))
        for a, b in zip(got, want):
            assert torch.equal(a, b)


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


def test_threads_do_not_change_a_bit():
    features = make_features((2, 70, 30, 30), "contiguous")
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
