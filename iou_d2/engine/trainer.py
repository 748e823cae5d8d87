"""The trainer: Detectron2's, with the data, the evaluators and the checkpoints of iou_d2."""

from __future__ import annotations

import logging
import weakref

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from iou_d2.data.mapper import CheckedDatasetMapper
from iou_d2.detectors.test_time_augmentation import with_tta
from iou_d2.errors import InputError
from iou_d2.evaluation.build import build_evaluator, results_folder

from .amp import trainer_class
from .best_checkpoint import BestCheckpoint
from .build import as_configured
from .checkpoint import SafeCheckpointer
from .class_rows import classes_of_model
from .ema import averaged_copy
from .freeze import freeze
from .parameter_names import parameters_of
from .pretrained import check_pretrained
from .solver import build_solver
from .train_data import TrainData
from .training_errors import name_images_of_errors, stop_at_non_finite_loss
from .wandb_writer import wandb_writers


class StopTraining(BaseException):
    """Ends the loop of Detectron2's trainer, which logs every Exception as an error."""


class Trainer(DefaultTrainer):
    """Detectron2's default trainer with the data and the evaluators of iou_d2, also in several
    processes on the CPU.

    Its checkpoints hold all that --resume needs. Detectron2 0.5 forgets the optimizer; main keeps
    it under "_trainer". Here both keep it so. The two group the parameters differently, so a run
    resumes on the version that began it.

    Attributes:
        average: the average of the weights, an AveragedModel, or None without SOLVER.EMA_DECAY. It
            is what is evaluated and what checkpoints hold as "model"; they have the weights in
            training beside it.
        best: the BestCheckpoint, or None without TEST.EVAL_PERIOD.
        frozen: names of the parameters that SOLVER.FREEZE froze.
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
        self.frozen = freeze(model, cfg.SOLVER.FREEZE)
        optimizer = self.build_optimizer(cfg, model)
        decay = cfg.SOLVER.EMA_DECAY
        self.average = averaged_copy(model, decay) if decay else None
        classes = classes_of_model(model, cfg)
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
            classes=classes,
            saved=self.average.module if self.average else None,
            trainer=weakref.proxy(self),
        )
        self.best = self._build_best(cfg)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @property
    def results(self) -> dict:
        """What the last evaluation gave, {task: {metric: value}}; empty before the first one, and
        on all processes but the main one."""
        return getattr(self, "_last_eval_results", None) or {}

    @property
    def iterations(self) -> int:
        """How many are done, in a hook that runs after one, and after training."""
        return min(self.iter + 1, self.max_iter)

    def build_hooks(self) -> list:
        """Those of Detectron2, of which the evaluation is `evaluate`, and after it, where TEST.AUG
        is enabled, `evaluate_with_TTA` at the end of training."""
        evaluation = EvalHook(self.cfg.TEST.EVAL_PERIOD, self.evaluate)
        hooks = [evaluation if isinstance(x, EvalHook) else x for x in super().build_hooks()]
        if self.cfg.TEST.AUG.ENABLED:
            hooks.insert(hooks.index(evaluation) + 1, EvalHook(0, self.evaluate_with_TTA))
        return hooks

    def build_writers(self) -> list:
        return [*super().build_writers(), *wandb_writers(self.cfg)]

    def evaluate(self) -> dict:
        """Evaluate the model in training, or its average, and keep the checkpoint of the best."""
        self._last_eval_results = self.test(self.cfg, self.evaluated)
        if self.best is not None:
            self.best.see(self.results, self.iterations)
            is_over = self.best.is_over(self.iterations) and self.iterations < self.max_iter
            self.best.stopped_after = self.iterations if _main_says(is_over) else 0
        return self._last_eval_results

    def evaluate_with_TTA(self) -> dict:
        """Add to `results` those with test-time augmentation, and return these."""
        results = self.test_with_TTA(self.cfg, self.evaluated)
        self._last_eval_results = {**self.results, **results}
        return results

    @property
    def evaluated(self) -> nn.Module:
        """The model in training, or its average."""
        return self.average.module if self.average else self.model

    def run_step(self) -> None:
        super().run_step()
        if self.average is not None:
            self.average.update_parameters(self.checkpointer.model)

    def after_step(self) -> None:
        super().after_step()
        if self.best is not None and self.best.stopped_after:
            raise StopTraining

    def train(self) -> None:
        """As that of DefaultTrainer, but it may end early: see SOLVER.PATIENCE."""
        logger = logging.getLogger(__name__)
        if self._has_stopped():
            logger.info(
                f"Training stopped after {self.best.stopped_after} iterations for want of a better "
                "AP. To go on, give a larger SOLVER.PATIENCE."
            )
            return
        if self.best is not None:
            self.best.stopped_after = 0
        try:
            super().train()
        except StopTraining:
            self.checkpointer.save("model_final", iteration=self.iter)
            logger.info(
                f"Training stops after {self.iterations} iterations, for no evaluation since that "
                f"after {self.best.iterations} had a better AP."
            )
            if self.cfg.TEST.AUG.ENABLED:
                self.evaluate_with_TTA()
            if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                verify_results(self.cfg, self.results)

    def state_dict(self) -> dict:
        last = self.iterations - 1
        state = {**TrainerBase.state_dict(self), "iteration": last}
        state["_trainer"] = {
            "iteration": last,
            "optimizer": self.optimizer.state_dict(),
            "parameters": self._learning(),
        }
        if hasattr(self._trainer, "grad_scaler"):
            state["_trainer"]["grad_scaler"] = self._trainer.grad_scaler.state_dict()
        state["data"] = self.data.state_dict(self.iterations - self.start_iter)
        if self.average is not None:
            state["ema"] = {
                "updates": int(self.average.n_averaged),
                "model": self.checkpointer.model.state_dict(),
            }
        if self.best is not None:
            state["best"] = self.best.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        TrainerBase.load_state_dict(self, state)
        if "_trainer" not in state:
            raise InputError(
                "The checkpoint holds no optimizer state: it was written by Detectron2 0.5's own "
                "trainer. Start from its weights with MODEL.WEIGHTS and without --resume."
            )
        self._load_optimizer(state["_trainer"])
        self.data.load_state_dict(state.get("data"))
        if hasattr(self._trainer, "grad_scaler") and "grad_scaler" in state["_trainer"]:
            self._trainer.grad_scaler.load_state_dict(state["_trainer"]["grad_scaler"])
        self._load_average(state.get("ema"))
        if self.best is not None and "best" in state:
            self.best.load_state_dict(state["best"])

    def _load_optimizer(self, state: dict) -> None:
        try:
            names = state.get("parameters")
            if names is not None and names != self._learning():
                raise ValueError("Other parameters learn.")
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise InputError(
                "The optimizer of the checkpoint has other parameters than this one. Resume with "
                "the config and the Detectron2 version (0.5 or main) that began the run."
            ) from error

    def _load_average(self, state: dict | None) -> None:
        """Go on with the average, which the checkpoint has as its model, and with the weights in
        training, which `state` has."""
        if self.average is None and state is not None:
            raise InputError(
                "The checkpoint holds an average of weights, but SOLVER.EMA_DECAY is 0. Resume "
                "with that of the run, or start from the average with MODEL.WEIGHTS and without "
                "--resume."
            )
        if self.average is None:
            return
        if state is None:
            logging.getLogger(__name__).warning(
                "The checkpoint holds no average of weights: SOLVER.EMA_DECAY begins a new one."
            )
            return
        model = self.checkpointer.model
        self.average.module.load_state_dict(model.state_dict())
        self.average.n_averaged.fill_(state["updates"])
        model.load_state_dict(state["model"])

    def _has_stopped(self) -> bool:
        """Whether the checkpoint is of a run that stopped early, and SOLVER.PATIENCE is no larger
        now."""
        if self.best is None:
            return False
        after = self.best.stopped_after
        return _main_says(after > 0 and self.best.is_over(after))

    def _learning(self) -> list[str]:
        """Names of the parameters that learn."""
        model = self.checkpointer.model
        return [name for name, x in parameters_of(model).items() if x.requires_grad]

    def frozen_anew(self) -> list[str]:
        """Names of parameters that SOLVER.FREEZE froze and that no weights were loaded into."""
        return [name for name in self.frozen if name not in self.checkpointer.filled]

    def _build_best(self, cfg: CfgNode) -> BestCheckpoint | None:
        if not (cfg.TEST.EVAL_PERIOD and cfg.DATASETS.TEST):
            return None
        return BestCheckpoint(
            self.checkpointer, cfg.DATASETS.TEST[0], cfg.TEST.EVAL_PERIOD, cfg.SOLVER.PATIENCE
        )

    @classmethod
    def build_model(cls, cfg):
        model = as_configured(super().build_model(cfg), cfg)
        if cfg.TEST.AUG.ENABLED:
            with_tta(cfg, model)  # says at once what cannot be augmented at the end
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

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """As `test`, with the augmentation of TEST.AUG: {task_TTA: {metric: value}}, or
        {dataset_TTA: {task: ...}} for several. Detectron2's train_net.py names them so.

        Result files are in "inference_TTA" of OUTPUT_DIR, beside "inference".
        """
        logging.getLogger(__name__).info("Evaluating with test-time augmentation.")
        as_stored = cfg.clone()
        as_stored.defrost()
        # The loader resizes nothing, since views are made of the images as they are.
        as_stored.INPUT.MIN_SIZE_TEST, as_stored.INPUT.AUGMENTATIONS = 0, []
        evaluators = [
            build_evaluator(cfg, name, results_folder(cfg, name, "inference_TTA"))
            for name in cfg.DATASETS.TEST
        ]
        results = cls.test(as_stored, with_tta(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}


def _main_says(flag: bool) -> bool:
    """`flag` of the main process, in all processes."""
    return comm.all_gather(flag)[0]


def share_gradients(model: nn.Module) -> nn.Module:
    """`model` as one of several processes trains it, with their mean gradient; alone, as it is."""
    if next(model.parameters()).is_cuda:
        return create_ddp_model(model, broadcast_buffers=False)
    return create_ddp_model(model, broadcast_buffers=False, device_ids=None)
