from __future__ import annotations

import math

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage

from iou_d2 import get_config
from iou_d2.engine.amp import CPUAMPTrainer, trainer_class
from iou_d2.engine.trainer import Trainer
from iou_d2.errors import DivergedError, InputError

CONFIGS = (
    "retinanet_shapes iou_retinanet_shapes vfnet_shapes atss_shapes fcos_shapes unitbox_shapes "
    "ssd_shapes ssd_iou_shapes refinedet_shapes faster_rcnn_shapes iou_net_shapes"
).split()


def losses_of(config: str, batch: list[dict], step: type[SimpleTrainer]) -> list[dict]:
    """The losses of three iterations on one batch."""
    cfg = get_config(f"quick/{config}", ["MODEL.DEVICE", "cpu", "SOLVER.BASE_LR", "0.0001"])
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    seen = []
    model.register_forward_hook(lambda module, inputs, losses: seen.append(dict(losses)))
    optimizer = Trainer.build_optimizer(cfg, model)
    trainer = step(model, [batch] * 3, optimizer)
    for iteration in range(3):
        torch.manual_seed(iteration)
        with EventStorage(iteration) as storage:
            trainer.storage, trainer.iter = storage, iteration
            trainer.run_step()
    return [{name: float(loss) for name, loss in losses.items()} for losses in seen]


@pytest.mark.parametrize("config", CONFIGS)
def test_bfloat16_on_the_cpu_trains_nearly_as_float32_does(config, make_batch):
    batch = make_batch([2, 1], side=64)
    precise = losses_of(config, batch, SimpleTrainer)
    mixed = losses_of(config, batch, CPUAMPTrainer)
    assert len(mixed) == 3
    for wanted, found in zip(precise, mixed):
        assert wanted.keys() == found.keys()
        assert all(map(math.isfinite, found.values()))
        assert sum(found.values()) == pytest.approx(sum(wanted.values()), rel=0.15)
    assert mixed != precise  # bfloat16 was used


def test_the_device_decides_about_the_trainer():
    model = torch.nn.Linear(1, 1)
    assert trainer_class(False, model) is SimpleTrainer
    assert trainer_class(True, model) is CPUAMPTrainer


@pytest.mark.parametrize("config", ["faster_rcnn_shapes", "iou_net_shapes"])
def test_a_diverged_rpn_names_iteration_and_images(config, make_batch):
    model = Trainer.build_model(get_config(f"quick/{config}", ["MODEL.DEVICE", "cpu"]))
    with torch.no_grad():
        model.proposal_generator.rpn_head.anchor_deltas.bias.fill_(math.nan)
    with EventStorage(7), pytest.raises(DivergedError, match=r"At iteration 7 .*ids \[0, 1\]"):
        model(make_batch([1, 2]))


def test_one_image_of_one_pixel_is_too_little_for_batch_norm(make_batch):
    model = Trainer.build_model(get_config("quick/retinanet_shapes", ["MODEL.DEVICE", "cpu"]))
    (image,) = make_batch([1])
    image["image"] = image["image"][:, :1, :1]
    with EventStorage(), pytest.raises(InputError, match=r"\(1, 1\).*INPUT.MIN_SIZE_TRAIN"):
        model([image])
