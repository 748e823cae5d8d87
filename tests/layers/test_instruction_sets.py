"""The compiled operators with narrower vectors than this processor has: PyTorch's variable
ATEN_CPU_CAPABILITY, which is read once a process, asks for them. The oracles are the plain
operations and torchvision's operator in float64."""

import os
import subprocess
import sys

import pytest
import torch

from iou_d2.layers import HAS_EXTENSION

# All other tests take the widest.
NARROWER = {"AVX2": ["default"], "AVX512": ["default", "avx2"]}
CODE = """
import torch
from torchvision import ops
from torchvision.ops import deform_conv2d

from iou_d2.layers import prroi_pool, prroi_pool_reference
from iou_d2.layers.batch_norm import batch_norm
from iou_d2.layers.conv3x3 import conv3x3
from iou_d2.layers.deform_conv import deform_conv
from iou_d2.layers.roi_align import roi_align

torch.manual_seed(0)


def close(a, b):
    torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def compared(ours, theirs, inputs):
    given = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    got, want = ours(*given), theirs(*exact)
    close(got, want)
    weight = torch.randn_like(got)
    grads = torch.autograd.grad(got, given, weight)
    for a, b in zip(grads, torch.autograd.grad(want, exact, weight.double())):
        close(a, b)


for channels in (3, 16, 37):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        features = torch.randn(2, channels, 24, 30).to(memory_format=memory_format)
        for count, side in ((20, 9.0), (200, 40.0)):  # pixel by pixel, and by way of a table
            corner = torch.rand(count, 2) * 15 - 2
            sides = 2 + torch.rand(count, 2) * side
            image = torch.arange(count).remainder(2)[:, None]
            rois = torch.cat([image, corner, corner + sides], 1)
            ours = lambda f, r: prroi_pool(f, r, (3, 2), 1.0, True)
            theirs = lambda f, r: prroi_pool_reference(f, r, (3, 2), 1.0, True)
            compared(ours, theirs, [features, rois])
        offsets, weight = torch.randn(2, 18, 24, 30), torch.randn(5, channels, 3, 3)
        ours = lambda f, o, w: deform_conv(f, o, w, padding=1)
        theirs = lambda f, o, w: deform_conv2d(f, o, w, padding=1)
        compared(ours, theirs, [features, offsets, weight])
    norm = torch.nn.BatchNorm2d(channels)
    ours = lambda x: batch_norm(x.contiguous(memory_format=torch.channels_last), norm, 0, 1)
    theirs = lambda x: torch.nn.functional.batch_norm(x, None, None, training=True).clamp(0, 1)
    compared(ours, theirs, [torch.randn(2, channels, 24, 30)])
plain = lambda x, w, b: torch.nn.functional.conv2d(x, w, b, padding=1)
compared(conv3x3, plain, [torch.randn(2, 48, 9, 14), torch.randn(32, 48, 3, 3), torch.randn(32)])
rois = torch.tensor([[0, 1.0, 2, 20, 13], [1, -3, 5, 28, 40]])
last = lambda x: x.contiguous(memory_format=torch.channels_last)
ours = lambda f: roi_align(last(f), rois, (3, 2), 0.5, 0, True)
theirs = lambda f: ops.roi_align(f, rois.double(), (3, 2), 0.5, 0, True)
compared(ours, theirs, [torch.randn(2, 48, 24, 30)])
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.skipif(not HAS_EXTENSION, reason="without the compiled operators")
@pytest.mark.parametrize("capability", NARROWER.get(torch.backends.cpu.get_cpu_capability(), []))
def test_operators_with_narrower_vectors(capability):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == capability.upper()
