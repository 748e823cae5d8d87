"""PrRoI pooling against a float64 closed form in NumPy and torch's own checkers."""

import numpy as np
import pytest
import torch

from iou_d2.layers import HAS_EXTENSION, PrRoIPool, prroi_pool, prroi_pool_reference
from prroi_pool_by_hand import LAYOUTS, gradients, make_features, make_rois, oracle

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


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
        got = torch.autograd.grad(out, (features, rois), torch.ones_like(out))
        for a, b in zip(got, want):
            assert torch.equal(a, b)
