"""PrRoI pooling on CUDA against the CPU in float64, and a closed form in NumPy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from iou_d2.layers import prroi_pool
from memory_layouts import LAYOUTS
from prroi_pool_by_hand import make_rois, oracle

DEVICE = "cuda"
CHANNELS = (1, 3, 4, 5, 8, 30, 64, 256)
BINS = ((1, 1), (7, 7), (14, 14), (1, 3), (3, 1), (32, 32))
CASES = [(c, size) for c in CHANNELS for size in BINS if c * size[0] * size[1] < 51_000]
# The largest errors, as shares of the largest value: of output, gradient of the features, and of
# the RoIs; and the least side of a RoI in pixels. The last gradient is a difference over the
# side of a RoI, in which the output's rounding counts.
TOLERANCES = {
    torch.float64: (1e-11, 1e-11, 1e-9, 0.01),
    torch.float32: (1e-5, 1e-5, 1e-3, 0.02),
    torch.float16: (2e-3, 2e-3, 5e-2, 1.0),
    torch.bfloat16: (1e-2, 1e-2, 3e-1, 1.0),
}


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).to(DEVICE)


def random_rois(height, width, least, count=16):
    """RoIs of the first and the last of three images, to which some that cover it are added."""
    rois = make_rois(count, 2, height, width, (least, 3 * width))
    rois[:, 0] *= 2
    whole = torch.tensor([[0, -3, -2, width + 5, height + 4], [2, 0, 0, width - 1, height - 1.0]])
    return torch.cat([rois, whole.double()])


def results(features, rois, weight, *args):
    """Output, and the gradients of features and RoIs for a gradient `weight` of the output; None
    is that of its sum."""
    features, rois = (x.detach().requires_grad_() for x in (features, rois))
    out = prroi_pool(features, rois, *args)
    weight = out.new_ones(()).expand_as(out) if weight is None else weight
    return out.detach(), *torch.autograd.grad(out, (features, rois), weight)


def double(tensor):
    return tensor.detach().cpu().double()


def agree(features, rois, weight, size, tolerances, scale=0.5, aligned=True):
    """CUDA and the CPU in float64."""
    found = results(features, rois, weight, size, scale, aligned)
    wanted = results(double(features), double(rois), double(weight), size, scale, aligned)
    for name, a, b, tolerance in zip(("output", "features", "rois"), found, wanted, tolerances):
        assert a.is_cuda or DEVICE == "cpu"
        assert a.dtype == (rois.dtype if name == "rois" else features.dtype)
        error = (double(a) - b).abs().max().item()
        assert error <= tolerance * b.abs().max().item() + 1e-30, (name, features.shape, size)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_all_channels_and_bins_equal_the_cpu(dtype, layout):
    *tolerances, least = TOLERANCES[dtype]
    for channels, size in CASES:
        features = LAYOUTS[layout](random(3, channels, 11, 14, dtype=dtype))
        rois = random_rois(22, 28, 2 * least).to(DEVICE)
        rois = rois if dtype == torch.float64 else rois.float()
        weight = random(len(rois), channels, *size, dtype=dtype, seed=1)
        out, to_features, _ = agree(features, rois, weight, size, tolerances)
        is_last = features.is_contiguous(memory_format=torch.channels_last)
        if is_last and not features.is_contiguous():
            assert out.is_contiguous(memory_format=torch.channels_last)
            assert to_features.is_contiguous(memory_format=torch.channels_last)
        assert (to_features[1] == 0).all()  # no RoI looks there


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_any_layout(dtype, layout):
    """A sum's has only strides of 0; a head that flattens gives one in another order."""
    *tolerances, least = TOLERANCES[dtype]
    features = LAYOUTS[layout](random(3, 12, 9, 10, dtype=dtype))
    rois = random_rois(18, 20, 2 * least).to(DEVICE)
    rois = rois if dtype == torch.float64 else rois.float()
    weight = random(len(rois), 12, 7, 5, dtype=dtype, seed=1)
    for change in (*LAYOUTS.values(), lambda x: x[:1, :1, :1, :1].expand_as(x)):
        agree(features, rois, change(weight), (7, 5), tolerances)


BOXES = [
    *([2.2, 2.3, 2.201, 2.302], [1.5, 0.2, 1.5001, 6], [3, 2, 3.001, 4]),  # thin
    *([1, 2, 5, 6], [0, 0, 7, 6], [2, 3, 3, 4]),  # whole pixels, where the surface has kinks
    *([-3.5, -2.5, 12.5, 11.5], [-40, -30, 50, 70], [-1e6, -1e6, 1e6, 1e6]),  # larger than the map
    *([50, 50, 60, 60], [-60, -60, -50, -50], [-1, -1, -0.5, 9], [1e6, 0, 2e6, 5]),  # outside
    *([5, 5, 2, 2], [2, 2, 2, 5], [3, 3, 3, 3]),  # inverted, no width, nothing
    *([1, np.nan, 3, 3], [1, 1, np.inf, 3], [-np.inf, 1, np.inf, 3], [-1e300, 0, 1e300, 4]),
]


@pytest.mark.parametrize("shape", [(7, 8), (1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_odd_boxes_equal_the_closed_form(shape, layout):
    features = LAYOUTS[layout](random(1, 4, *shape, dtype=torch.float64))
    rois = torch.tensor([[0, *box] for box in BOXES], dtype=torch.float64, device=DEVICE)
    for aligned in (False, True):
        found = prroi_pool(features, rois, (2, 3), 1.0, aligned)
        wanted = oracle(features.cpu(), rois.cpu(), (2, 3), 1.0, aligned)
        # The closed form is a difference of antiderivatives, divided by 1e-4 pixels.
        np.testing.assert_allclose(found.cpu().numpy(), wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_one_odd_box_has_the_gradients_of_the_cpu(box):
    rois = torch.tensor([[1, *box]], dtype=torch.float64, device=DEVICE)
    for shape in ((7, 8), (1, 1), (1, 9), (9, 1)):
        for layout in ("contiguous", "channels_last"):
            features = LAYOUTS[layout](random(2, 8, *shape, dtype=torch.float64))
            weight = random(1, 8, 2, 3, dtype=torch.float64, seed=1)
            agree(features, rois, weight, (2, 3), (1e-10, 1e-10, 1e-8), scale=1.0)


def test_hostile_rois_are_finite():
    generator = np.random.default_rng(0)
    values = [0, 1, 7, 0.5, 1e-45, 1e-9, 1e6, -1e6, 3e38, -3e38, np.nan, np.inf, -np.inf]
    boxes = generator.normal(size=(20000, 4)) * 10.0 ** generator.integers(-4, 8, (20000, 4))
    odd = generator.random(boxes.shape) < 0.3
    boxes[odd] = generator.choice(np.array(values), odd.sum())
    rois = np.concatenate([generator.integers(2, size=(20000, 1)), boxes], 1)
    rois = torch.from_numpy(rois).float().to(DEVICE)
    for layout in LAYOUTS:
        features = LAYOUTS[layout](random(2, 5, 7, 8))
        out, *grads = results(features, rois, None, (2, 3), 0.25, True)
        assert out.isfinite().all() and out.abs().max() <= features.abs().max() * (1 + 1e-5)
        assert all(gradient.isfinite().all() for gradient in grads)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_no_rois_no_images_and_no_channels(dtype):
    features = random(2, 3, 4, 5, dtype=dtype).requires_grad_()
    rois = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    out = prroi_pool(features, rois, (2, 3))
    assert out.shape == (0, 3, 2, 3)
    out.sum().backward()
    assert (features.grad == 0).all() and rois.grad.shape == (0, 5)
    none = torch.zeros(0, 3, 4, 5, dtype=dtype, device=DEVICE)
    assert prroi_pool(none, rois, 2).shape == (0, 3, 2, 2)
    rois = torch.zeros(2, 5, device=DEVICE)
    assert prroi_pool(features[:, :0], rois, 2).shape == (2, 0, 2, 2)


def test_only_what_needs_a_gradient_has_one():
    features, rois = random(3, 8, 9, 9), random_rois(9, 9, 1).float().to(DEVICE)
    _, *wanted = results(features, rois, None, 3)
    learnt = features.clone().requires_grad_()
    (to_features,) = torch.autograd.grad(prroi_pool(learnt, rois, 3).sum(), learnt)
    torch.testing.assert_close(to_features, wanted[0])
    moving = rois.clone().requires_grad_()
    (to_rois,) = torch.autograd.grad(prroi_pool(features, moving, 3).sum(), moving)
    assert torch.equal(to_rois, wanted[1])


def test_more_rois_than_a_grid_has_rows_elsewhere():
    features = random(3, 1, 11, 14, dtype=torch.float64)
    rois = random_rois(22, 28, 0.1, count=70_000).to(DEVICE)
    agree(features, rois, random(len(rois), 1, 1, 1, dtype=torch.float64), (1, 1), [1e-9] * 3)


def test_a_map_of_more_than_2_to_the_31_numbers():
    """Only its last pixels are not 0, so that a map of these alone says what is to come out."""
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("The map takes 6 GiB, and the GPU has less than 10 GiB left.")
    side, corner = 2**15, 2**15 - 8
    features = torch.zeros(3, 1, side, side, dtype=torch.float16, device=DEVICE)
    features[2, :, -8:, -8:] = random(1, 8, 8, dtype=torch.float16)
    small = features[2:, :, -8:, -8:].contiguous()
    rois = make_rois(30, 1, 8, 8, (2, 9)).to(DEVICE)
    moved = rois + torch.tensor([2, *[corner] * 4], device=DEVICE)
    # Only pixels of the corner and beyond the map, where both are 0.
    found, wanted = prroi_pool(features, moved, 3), prroi_pool(small, rois, 3)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout):
    features = LAYOUTS[layout](random(2, 4, 6, 7, dtype=torch.float64)).requires_grad_()
    rois = [[0, 0.3, 0.6, 4.2, 3.7], [1, -1.4, 1.3, 2.6, 8.2], [1, 2.2, 2.2, 2.4, 2.7]]
    rois = torch.tensor(rois, dtype=torch.float64, device=DEVICE)
    boxes = rois[:, 1:].clone().requires_grad_()

    def pool(features, boxes):
        return prroi_pool(features, torch.cat([rois[:, :1], boxes], 1), (2, 3), 0.9, True)

    # Sums that are added in any order.
    assert torch.autograd.gradcheck(pool, (features, boxes), nondet_tol=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_opcheck(layout, needs):
    features = LAYOUTS[layout](random(2, 4, 5, 6)).requires_grad_(needs[0])
    rois = make_rois(4, 2, 5, 6, (1, 5)).float().to(DEVICE).requires_grad_(needs[1])
    torch.library.opcheck(torch.ops.iou_d2.prroi_pool.default, (features, rois, 0.5, 2, 3, True))


def test_autocast_changes_nothing():
    features, rois = random(3, 4, 9, 9), random_rois(9, 9, 1).float().to(DEVICE)
    wanted = results(features, rois, None, (2, 2))
    with torch.autocast(DEVICE, dtype=torch.float16):
        found = results(features, rois, None, (2, 2))
    for a, b in zip(found, wanted):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


def test_deterministic_algorithms_are_refused_where_there_is_none():
    features, rois = random(3, 4, 9, 9), random_rois(9, 9, 1).float().to(DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        moving = rois.clone().requires_grad_()
        runs = [prroi_pool(features, moving, 3) for _ in range(2)]
        assert torch.equal(*runs)
        assert torch.equal(*(torch.autograd.grad(out.sum(), moving)[0] for out in runs))
        out = prroi_pool(features.requires_grad_(), rois, 3)
        with pytest.raises(RuntimeError, match="prroi_pool_backward_features on CUDA"):
            out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_it_runs_on_the_current_stream_and_waits_for_nothing():
    values, rois = random(3, 64, 30, 30), random_rois(30, 30, 1).float().to(DEVICE)
    weight = random(len(rois), 64, 7, 7, seed=1)
    wanted = results(values, rois, weight, 7)
    features = torch.zeros_like(values)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)  # cycles: another stream would see zeros
            features.copy_(values)
            found = results(features, rois, weight, 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "words, change",
    [
        ("features are on cuda:0 and rois on cpu", {"rois": torch.zeros(2, 5)}),
        ("may add up to 500", {"output_size": (499, 2)}),
        ("feature map is empty", {"features": torch.zeros(1, 2, 0, 5)}),
        ("output size must be positive", {"output_size": (0, 2)}),
    ],
)
def test_wrong_arguments_raise_sentences(words, change):
    arguments = {
        "features": torch.zeros(1, 2, 4, 5, device=DEVICE),
        "rois": torch.zeros(2, 5, device=DEVICE),
        "output_size": 2,
    }
    with pytest.raises(ValueError, match=words):
        if "features" in change:
            change = {"features": change["features"].to(DEVICE)}
        prroi_pool(**{**arguments, **change})


def test_a_wrong_batch_index_stops_the_device():
    """In a process of its own, whose GPU is of no use from then on."""
    program = """
import torch
from iou_d2.layers import prroi_pool
prroi_pool(torch.ones(1, 2, 4, 5, device="cuda"), torch.full((1, 5), 7.0, device="cuda"), 2)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "batch index out of range" in done.stdout + done.stderr
