from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from iou_d2.engine.trainer import Trainer, stop_at_non_finite_loss
from iou_d2.errors import InputError


def test_an_optimizer_of_other_parameters_is_refused_with_a_way_out():
    trainer = Trainer.__new__(Trainer)
    trainer._hooks = []
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    one_group = torch.optim.SGD(weights, lr=0.1)
    two_groups = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1)
    trainer._trainer = SimpleNamespace(optimizer=one_group)
    with pytest.raises(ValueError, match="Detectron2 version .* that began the run"):
        trainer.load_state_dict(
            {"iteration": 3, "_trainer": {"optimizer": two_groups.state_dict()}}
        )


def test_a_checkpoint_without_optimizer_is_refused_with_a_way_out():
    trainer = Trainer.__new__(Trainer)
    trainer._hooks = []
    with pytest.raises(InputError, match="holds no optimizer state.*MODEL.WEIGHTS"):
        trainer.load_state_dict({"iteration": 3})


class CountReads(TorchDispatchMode):
    """Counts how often a value is read off a tensor, for which a GPU has to finish its work."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_losses_are_read_once_a_step():
    losses = {name: torch.tensor(1.0, requires_grad=True) for name in "abcde"}
    with CountReads() as count:
        stop_at_non_finite_loss(nn.Linear(1, 1).train(), ([],), losses)
    assert count.reads == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_waits_for_the_gpu_once():
    losses = {name: torch.ones((), device="cuda") for name in "abc"}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA operation") as warnings:
            stop_at_non_finite_loss(nn.Linear(1, 1).train(), ([],), losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(warnings) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_losses_that_are_not_finite_are_named_with_their_images(value):
    losses = {"good": torch.tensor(2.0), "bad": torch.tensor(value, dtype=torch.float16)}
    inputs = ([{"image_id": 7}, {"file_name": "x.png"}],)
    model = nn.Linear(1, 1)
    with EventStorage(start_iter=12), pytest.raises(FloatingPointError) as error:
        stop_at_non_finite_loss(model, inputs, losses)
    assert f"At iteration 12 the losses {{'bad': {value}}} are not finite" in str(error.value)
    assert "the ids [7, 'x.png']" in str(error.value)
    stop_at_non_finite_loss(model.eval(), inputs, losses)  # detections are no losses


def test_a_model_without_losses_is_left_alone():
    stop_at_non_finite_loss(nn.Linear(1, 1), ([],), {})
