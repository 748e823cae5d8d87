"""The trainer: Detectron2's, with the data, the evaluators and the checkpoints of iou_d2."""

from __future__ import annotations

import logging
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn

from iou_d2.data.mapper import CheckedDatasetMapper
from iou_d2.evaluation.build import build_evaluator

from .checkpoint import SafeCheckpointer
from .pretrained import check_pretrained
from .solver import build_solver


class Trainer(DefaultTrainer):
    """Detectron2's default trainer with the data and the evaluators of iou_d2, also in several
    processes on the CPU.

    Its checkpoints hold all that --resume needs. Detectron2 0.5 forgets the optimizer; main keeps
    it under "_trainer". Here both keep it so. The two group the parameters differently, so a run
    resumes on the version that began it.
    """

    def __init__(self, cfg: CfgNode):
        # Not that of DefaultTrainer, which wraps each model as one on a GPU, and so fails on CPUs.
        TrainerBase.__init__(self)
        check_pretrained(cfg)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        model = share_gradients(model)
        trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer_class(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            extra={"class_names": list(cfg.MODEL.CLASS_NAMES)},
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @property
    def results(self) -> dict:
        """What the last evaluation gave, {task: {metric: value}}; empty before the first one, and
        on all processes but the main one."""
        return getattr(self, "_last_eval_results", None) or {}

    def state_dict(self) -> dict:
        state = TrainerBase.state_dict(self)
        state["_trainer"] = {"iteration": self.iter, "optimizer": self.optimizer.state_dict()}
        if hasattr(self._trainer, "grad_scaler"):
            state["_trainer"]["grad_scaler"] = self._trainer.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        TrainerBase.load_state_dict(self, state)
        if "_trainer" not in state:
            raise KeyError(
                "The checkpoint holds no optimizer state: it was written by Detectron2 0.5's own "
                "trainer. Start from its weights with MODEL.WEIGHTS and without --resume."
            )
        try:
            self.optimizer.load_state_dict(state["_trainer"]["optimizer"])
        except ValueError as error:
            raise ValueError(
                "The optimizer of the checkpoint has other parameters than this one. Resume with "
                "the config and the Detectron2 version (0.5 or main) that began the run."
            ) from error
        if hasattr(self._trainer, "grad_scaler") and "grad_scaler" in state["_trainer"]:
            self._trainer.grad_scaler.load_state_dict(state["_trainer"]["grad_scaler"])

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        model.register_forward_hook(stop_at_non_finite_loss)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_solver(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=CheckedDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return build_evaluator(cfg, dataset_name)


def share_gradients(model: nn.Module) -> nn.Module:
    """`model` as one of several processes trains it, with their mean gradient; alone, as it is."""
    if next(model.parameters()).is_cuda:
        return create_ddp_model(model, broadcast_buffers=False)
    return create_ddp_model(model, broadcast_buffers=False, device_ids=None)


def stop_at_non_finite_loss(model: nn.Module, inputs: tuple, losses: dict[str, Tensor]) -> None:
    """A forward hook: name the iteration, the losses and the images where a loss is not finite.

    `losses` are scalars. The device is waited for once, however many there are.
    """
    if not model.training or not losses:
        return
    values = torch.stack([loss.detach() for loss in losses.values()])
    if torch.isfinite(values).all():
        return
    is_finite = torch.isfinite(values).tolist()
    bad = {name: value for name, value, good in zip(losses, values.tolist(), is_finite) if not good}
    images = [image.get("image_id", image.get("file_name")) for image in inputs[0]]
    raise FloatingPointError(
        f"At iteration {get_event_storage().iter} the losses {bad} are not finite, for the "
        f"images with the ids {images}. A lower SOLVER.BASE_LR may help."
    )
