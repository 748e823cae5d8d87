"""The trainer: Detectron2's, with the data, the evaluators and the checkpoints of iou_d2."""

from __future__ import annotations

import functools
import logging
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import (
    DefaultTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn

from iou_d2.data.mapper import CheckedDatasetMapper
from iou_d2.errors import DivergedError, InputError
from iou_d2.evaluation.build import build_evaluator

from .amp import trainer_class
from .checkpoint import SafeCheckpointer
from .pretrained import check_pretrained
from .solver import build_solver
from .train_data import TrainData


class Trainer(DefaultTrainer):
    """Detectron2's default trainer with the data and the evaluators of iou_d2, also in several
    processes on the CPU.

    Its checkpoints hold all that --resume needs. Detectron2 0.5 forgets the optimizer; main keeps
    it under "_trainer". Here both keep it so. The two group the parameters differently, so a run
    resumes on the version that began it.
    """

    def __init__(self, cfg: CfgNode, trust_weights: bool = False):
        """
        Args:
            trust_weights: let the file of MODEL.WEIGHTS make any object, and so run any code.
        """
        # Not that of DefaultTrainer, which wraps each model as one on a GPU, and so fails on CPUs.
        TrainerBase.__init__(self)
        check_pretrained(cfg)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.data = self.build_train_loader(cfg)
        model = share_gradients(model)
        step = trainer_class(cfg.SOLVER.AMP.ENABLED, model)
        self._trainer = step(model, self.data, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            extra={"class_names": list(cfg.MODEL.CLASS_NAMES)},
            trust=trust_weights,
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
        state["data"] = self.data.state_dict(self.iter + 1 - self.start_iter)
        return state

    def load_state_dict(self, state: dict) -> None:
        TrainerBase.load_state_dict(self, state)
        if "_trainer" not in state:
            raise InputError(
                "The checkpoint holds no optimizer state: it was written by Detectron2 0.5's own "
                "trainer. Start from its weights with MODEL.WEIGHTS and without --resume."
            )
        try:
            self.optimizer.load_state_dict(state["_trainer"]["optimizer"])
        except ValueError as error:
            raise InputError(
                "The optimizer of the checkpoint has other parameters than this one. Resume with "
                "the config and the Detectron2 version (0.5 or main) that began the run."
            ) from error
        self.data.load_state_dict(state.get("data"))
        if hasattr(self._trainer, "grad_scaler") and "grad_scaler" in state["_trainer"]:
            self._trainer.grad_scaler.load_state_dict(state["_trainer"]["grad_scaler"])

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        model.register_forward_hook(stop_at_non_finite_loss)
        name_images_of_errors(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_solver(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return TrainData(cfg)

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
    raise DivergedError(
        f"At iteration {_iteration()} the losses {bad} are not finite, {_of(inputs[0])}"
    )


def name_images_of_errors(model: nn.Module) -> None:
    """Let two errors that a model raises in training, before there are losses, name the images:
    the FloatingPointError of Detectron2's RPN, and the ValueError of batch norm, which has no
    statistics of a single value."""
    forward = model.forward

    @functools.wraps(forward)
    def named(batched_inputs, *args, **kwargs):
        try:
            return forward(batched_inputs, *args, **kwargs)
        except DivergedError:
            raise
        except FloatingPointError as error:
            raise DivergedError(
                f"At iteration {_iteration()} there are no losses: {error} It was "
                f"{_of(batched_inputs)}"
            ) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            sizes = [tuple(image["image"].shape[-2:]) for image in batched_inputs]
            raise InputError(
                f"The images of height and width {sizes} leave one value a channel, of which no "
                "layer can norm: raise INPUT.MIN_SIZE_TRAIN or MIN_SIZE_TEST."
            ) from error

    model.forward = named


def _iteration() -> int:
    return get_event_storage().iter


def _of(batched_inputs: list[dict]) -> str:
    images = [image.get("image_id", image.get("file_name")) for image in batched_inputs]
    return f"for the images with the ids {images}. A lower SOLVER.BASE_LR may help."
