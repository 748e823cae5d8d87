"""Detectors of other libraries as modules that take what the benchmarks hand to ours, and runs in
turn of models that take different batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import in_turn, inference_runs, training_runs
from iou_d2.engine.convert import translate_tensors


class TorchvisionDetector(nn.Module):
    """A detector of torchvision that takes a batch from `torchvision_batch`."""

    layout = "torchvision"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Sequence[dict]) -> dict[str, Tensor] | list[dict]:
        """Losses by name while training, else torchvision's detections."""
        images = [x["image"] for x in batch]
        return self.model(images, [x["target"] for x in batch] if self.training else None)


def torchvision_batch(batch: Sequence[dict], device: str) -> list[dict]:
    """Detectron2's input as torchvision has it: images in [0, 1] and labels from 1 on, on the
    device of the model."""
    converted = []
    for entry in batch:
        truth = entry["instances"].to(device)
        target = {"boxes": truth.gt_boxes.tensor, "labels": truth.gt_classes + 1}
        if truth.has("gt_masks"):
            target["masks"] = truth.gt_masks.tensor.to(torch.uint8)
        converted.append({"image": entry["image"].to(device) / 255, "target": target})
    return converted


class MMDetDetector(nn.Module):
    """A detector of mmdetection 3 that takes a batch from `mmdet_batch`."""

    layout = "mmdet"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> dict[str, Tensor] | list:
        """Losses by name while training, else mmdetection's detections."""
        data = self.model.data_preprocessor(batch, self.training)
        if not self.training:
            return self.model(**data, mode="predict")
        losses = self.model(**data, mode="loss")
        return {"loss": self.model.parse_losses(losses)[0]}


def mmdet_config(name: str) -> Any:
    """The mmengine.Config of a file of mmdetection, such as "ssd/ssd300_coco.py", for a model of
    random weights whose batch norm is frozen."""
    import mmdet
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    cfg = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs" / name)
    cfg.model.backbone.init_cfg = None
    if "norm_cfg" in cfg.model.backbone:
        cfg.model.backbone.norm_cfg.requires_grad = False
    return cfg


def build_mmdet(cfg: Any) -> MMDetDetector:
    """The detector of a config of `mmdet_config`."""
    from mmdet.registry import MODELS
    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().setLevel("WARNING")  # it logs each initial weight
    model = MODELS.build(cfg.model)
    model.init_weights()
    # Inference of mmdetection 3.3 asks the loss of a head for its channels, and SSD's has none.
    if cfg.model.get("bbox_head", {}).get("type") == "SSDHead":
        model.bbox_head.loss_cls = None
    return MMDetDetector(model)


def mmdet_batch(batch: Sequence[dict], device: str) -> dict:
    """Detectron2's input as mmdetection's data loaders have it, whose images are BGR; the model
    moves it."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    samples = []
    for entry in batch:
        truth, size = entry["instances"], tuple(entry["image"].shape[1:])
        sample = DetDataSample(
            metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
        )
        sample.gt_instances = InstanceData(bboxes=truth.gt_boxes.tensor, labels=truth.gt_classes)
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)
        )
        if truth.has("gt_masks"):
            masks = truth.gt_masks.tensor.numpy().astype("uint8")
            sample.gt_instances.masks = BitmapMasks(masks, *size)
        samples.append(sample)
    return {"inputs": [x["image"] for x in batch], "data_samples": samples}


def copy_weights(peer: TorchvisionDetector | MMDetDetector, ours: nn.Module) -> None:
    """Give our model the weights of `peer`, so that both detect alike.

    Raises RuntimeError where one has parameters that the other has not.
    """
    theirs = peer.model.state_dict()
    theirs = {name: x for name, x in theirs.items() if not name.endswith("num_batches_tracked")}
    tensors = translate_tensors(theirs, peer.layout, "detectron2").tensors
    constants = {name: x for name, x in ours.state_dict().items() if "anchor" in name}
    ours.load_state_dict({**constants, **tensors})


def training_in_turn(
    models: dict[str, nn.Module], batches: dict, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a training step of each model with the batch of its name."""
    return _times(training_runs, models, batches, rounds)


@torch.no_grad()
def inference_in_turn(
    models: dict[str, nn.Module], batches: dict, rounds: int
) -> dict[str, list[float]]:
    """Seconds of the inference of each model with the batch of its name."""
    return _times(inference_runs, models, batches, rounds)


def _times(runs_of: Callable, models: dict, batches: dict, rounds: int) -> dict[str, list[float]]:
    runs: dict[str, Callable] = {}
    for name, model in models.items():
        runs |= runs_of({name: model}, batches[name])
    return in_turn(runs, rounds)
