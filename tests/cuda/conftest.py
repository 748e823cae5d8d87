"""Tests of what runs on a GPU; elsewhere all are skipped, here."""

from __future__ import annotations

import pytest
import torch

from iou_d2.layers.extension import DEVICES


@pytest.fixture(autouse=True, scope="session")
def exact_gpu():
    """A GPU whose products of float32 are those of float32: TF32 has 10 bits, and is what cuDNN
    computes with unless it is told not to."""
    if not torch.cuda.is_available():
        pytest.skip("These tests need a GPU.")
    assert "cuda" in DEVICES, "iou_d2 was compiled without CUDA."
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, value in zip(backends, before):
        backend.allow_tf32 = value
