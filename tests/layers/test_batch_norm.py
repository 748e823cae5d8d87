"""The compiled batch norm against PyTorch's operators in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from iou_d2.layers import HAS_EXTENSION
from iou_d2.layers.batch_norm import batch_norm, is_compiled_for

pytestmark = pytest.mark.skipif(not HAS_EXTENSION, reason="without the compiled operators")
ENDS = {"none": (-math.inf, math.inf), "ReLU": (0.0, math.inf), "ReLU6": (0.0, 6.0)}


def maps(*shape: int, mean: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = mean + 3 * torch.randn(shape, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def norm_of(channels: int, **arguments) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(channels, **arguments)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, 1.0)
    return norm


def exact(x: torch.Tensor, norm: nn.BatchNorm2d, ends: tuple, grad: torch.Tensor) -> tuple:
    """The outputs in float64, the gradients of x, weight and bias, and the norm thereafter."""
    norm = copy.deepcopy(norm).double()
    x = x.detach().double().requires_grad_()
    y = F.hardtanh(norm(x), *ends)
    return y, torch.autograd.grad(y, (x, norm.weight, norm.bias), grad.double()), norm


def close(found: torch.Tensor, wanted: torch.Tensor, share: float) -> None:
    torch.testing.assert_close(
        found.double(), wanted, rtol=0, atol=share * wanted.abs().max().item()
    )


# One part of pixels and several, their last ones whole and not; fewer channels than a vector has.
@pytest.mark.parametrize("shape", [(2, 16, 9, 7), (1, 3, 40, 60), (2, 37, 33, 47), (2, 960, 3, 5)])
@pytest.mark.parametrize("ends", ENDS)
def test_values_gradients_and_statistics(shape, ends):
    x, norm, grad = maps(*shape).requires_grad_(), norm_of(shape[1]), maps(*shape, mean=0, seed=2)
    wanted, gradients, after = exact(x, norm, ENDS[ends], grad)
    assert is_compiled_for(norm, x)
    y = batch_norm(x, norm, *ENDS[ends])
    close(y, wanted, 1e-6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for found, want in zip(torch.autograd.grad(y, (x, norm.weight, norm.bias), grad), gradients):
        close(found, want, 1e-5)
    for found, want in zip(norm.buffers(), after.buffers(), strict=True):
        close(found, want.double(), 3e-6)


def test_means_far_from_zero_cost_no_digits():
    """Squares of numbers about 10,000 that differ by 3 have no digit left of their variance."""
    x, norm = maps(2, 16, 50, 60, mean=1e4), norm_of(16)
    wanted, _, after = exact(x, norm, ENDS["none"], torch.zeros_like(x))
    y = batch_norm(x, norm)
    close(norm.running_var, after.running_var, 1e-6)
    # x itself is rounded to 0.001, and its mean, too.
    close(y, wanted, 1e-3)


def test_momenta():
    for momentum in (0.1, 0.9, None):
        norm = norm_of(16, momentum=momentum)
        twin = copy.deepcopy(norm)
        for seed in range(3):
            x = maps(2, 16, 8, 8, seed=seed)
            batch_norm(x, norm)
            twin(x)
        for found, want in zip(norm.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_no_gradient_passes_at_the_ends_of_the_clamp():
    """A channel of one number has z = bias, which is 0 and 6 here."""
    x = torch.ones(2, 2, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = nn.BatchNorm2d(2)
    norm.bias.data = torch.tensor([0.0, 6.0])
    y = batch_norm(x, norm, 0, 6)
    y.sum().backward()
    assert y[:, 0].eq(0).all() and y[:, 1].eq(6).all()
    assert x.grad.eq(0).all() and norm.bias.grad.eq(0).all() and norm.weight.grad.eq(0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value):
    x, norm = maps(2, 4, 5, 5), norm_of(4)
    x[0, 1, 2, 3] = value
    x.requires_grad_()
    y = batch_norm(x, norm, 0, 6)
    y.sum().backward()
    assert y[:, 1].isnan().all() and y[:, [0, 2, 3]].isfinite().all()
    assert x.grad[:, 1].isnan().all() and norm.running_mean[[0, 2, 3]].isfinite().all()


def test_the_number_of_threads_changes_no_bit():
    x, grad, outputs = maps(3, 24, 61, 70), maps(3, 24, 61, 70, seed=2), []
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            given, norm = x.clone().requires_grad_(), norm_of(24)
            y = batch_norm(given, norm, 0, 6)
            y.backward(grad)
            outputs.append((y, given.grad, norm.weight.grad, norm.bias.grad, norm.running_var))
    finally:
        torch.set_num_threads(before)
    for others in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], others, strict=True))


def test_gradients_come_in_any_order_of_memory():
    x, norm, grad = maps(2, 16, 9, 7).requires_grad_(), norm_of(16), maps(2, 16, 9, 7, seed=2)
    gradients = [
        torch.autograd.grad(batch_norm(x, norm, 0, 6), x, each)[0]
        for each in (grad, grad.contiguous(), grad.expand(2, 16, 9, 7))
    ]
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_what_it_is_not_for():
    x, norm = maps(2, 16, 9, 7), norm_of(16)
    assert is_compiled_for(norm, x)
    assert not is_compiled_for(norm, x.contiguous())
    assert not is_compiled_for(norm, x.double()) and not is_compiled_for(norm, x.bfloat16())
    assert not is_compiled_for(norm, x[:0]) and not is_compiled_for(norm, x[:1, :, :1, :1])
    assert not is_compiled_for(nn.SyncBatchNorm(16), x)
    assert not is_compiled_for(nn.BatchNorm2d(16, affine=False), x)
    assert not is_compiled_for(copy.deepcopy(norm).eval(), x)
    assert not is_compiled_for(nn.BatchNorm2d(16, track_running_stats=False), x)


def test_a_second_derivative_is_refused():
    x, norm = maps(2, 4, 5, 5).requires_grad_(), norm_of(4)
    (gradient,) = torch.autograd.grad(batch_norm(x, norm).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4, 5, 5)}, ValueError, r"x must be \(N, C, H, W\) in channels-last"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must be .* got shape \[2, 4\]"),
        ({"x": maps(2, 4, 5, 5).double()}, TypeError, "x must be float32, got Double"),
        ({"x": maps(0, 4, 5, 5)}, ValueError, r"x has no pixels, its shape is \[0, 4, 5, 5\]"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must be 4 float32 numbers, got \[5\]"),
        ({"bias": torch.ones(4).double()}, ValueError, r"bias must be .* of Double"),
    ],
)
def test_bad_input_gets_one_sentence(change, error, message):
    given = {"x": maps(2, 4, 5, 5), "weight": torch.ones(4), "bias": torch.zeros(4)} | change
    with pytest.raises(error, match=message):
        torch.ops.iou_d2.batch_norm(*given.values(), 1e-5, 0, 6)


def test_a_gradient_that_does_not_fit_gets_one_sentence():
    x, numbers = maps(2, 4, 5, 5), [torch.ones(4)] * 4
    with pytest.raises(ValueError, match=r"a gradient of shape \[2, 4, 5, 6\] does not fit"):
        torch.ops.iou_d2.batch_norm_backward(maps(2, 4, 5, 6), x, *numbers, 1e-5, 0, 6)


def test_compiled_code_computes_the_same():
    x, norm = maps(2, 16, 9, 7).requires_grad_(), norm_of(16)
    twin = copy.deepcopy(norm)
    step = torch.compile(lambda x: batch_norm(x, norm, 0, 6), backend="aot_eager")
    y, wanted = step(x), batch_norm(x, twin, 0, 6)
    assert torch.equal(y, wanted) and torch.equal(norm.running_var, twin.running_var)
    gradients = [torch.autograd.grad(each.square().sum(), x)[0] for each in (y, wanted)]
    assert torch.equal(*gradients)
