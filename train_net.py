"""Train or evaluate a detector of iou_d2, as in any Detectron2 project.

    python train_net.py --config-file configs/quick/iou_retinanet_shapes.yaml
    python train_net.py --config-file output/x/config.yaml --eval-only \\
        MODEL.WEIGHTS output/x/model_final.pth
    python train_net.py --config-file configs/iou_retinanet_R_50_FPN_1x.yaml \\
        DATASETS.TRAIN "('coco:train.json:images',)" DATASETS.TEST "('voc:VOC2007:test',)"
"""

from __future__ import annotations

import json
import logging
import os

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import setup_logger

from iou_d2 import get_config
from iou_d2.config import set_class_names
from iou_d2.data.mapper import CheckedDatasetMapper
from iou_d2.data.register import class_names, register_dataset
from iou_d2.data.shapes import ensure_shapes
from iou_d2.engine.compat import ResumableTrainer
from iou_d2.engine.solver import build_solver
from iou_d2.evaluation.build import build_evaluator


class Trainer(ResumableTrainer):
    """Detectron2's default trainer with the data and the evaluators of iou_d2."""

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


def stop_at_non_finite_loss(model, inputs, losses) -> None:
    """A forward hook: name the iteration, the losses and the images where a loss is not finite."""
    if not model.training:
        return
    bad = {name: loss.item() for name, loss in losses.items() if not torch.isfinite(loss).all()}
    if bad:
        images = [image.get("image_id", image.get("file_name")) for image in inputs[0]]
        raise FloatingPointError(
            f"At iteration {get_event_storage().iter} the losses {bad} are not finite, for the "
            f"images with the ids {images}. A lower SOLVER.BASE_LR may help."
        )


def use_datasets(cfg: CfgNode, eval_only: bool) -> None:
    """Register the datasets of `cfg`, and take the names and the number of classes from them."""
    clean_dir = os.path.join(cfg.OUTPUT_DIR, "datasets")
    cfg.DATASETS.TEST = tuple(register_dataset(name, clean_dir) for name in cfg.DATASETS.TEST)
    used = cfg.DATASETS.TEST
    if not eval_only:
        cfg.DATASETS.TRAIN = tuple(register_dataset(name, clean_dir) for name in cfg.DATASETS.TRAIN)
        used = cfg.DATASETS.TRAIN + used
    names = class_names(used)
    if eval_only and cfg.MODEL.CLASS_NAMES not in ([], names):
        raise ValueError(
            f"The model knows the classes {cfg.MODEL.CLASS_NAMES}, but DATASETS.TEST has {names}."
        )
    set_class_names(cfg, names)
    for name in used:
        ensure_shapes(name)


def setup(args) -> CfgNode:
    cfg = get_config(args.config_file, args.opts)
    use_datasets(cfg, args.eval_only)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="iou_d2")
    return cfg


def log_results(cfg: CfgNode, results: dict) -> None:
    """Append the results of an evaluation to metrics.json, where training logs its own."""
    with open(os.path.join(cfg.OUTPUT_DIR, "metrics.json"), "a") as file:
        file.write(json.dumps(flatten_results_dict(results)) + "\n")


def main(args):
    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()

    model = Trainer.build_model(cfg)
    DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
        cfg.MODEL.WEIGHTS, resume=args.resume
    )
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        log_results(cfg, results)
        verify_results(cfg, results)
    return results


if __name__ == "__main__":
    arguments = default_argument_parser(epilog=__doc__).parse_args()
    if arguments.num_gpus > 1 and not torch.cuda.is_available():
        logging.getLogger("detectron2").warning(
            "--num-gpus needs CUDA, so one CPU process is used."
        )
        arguments.num_gpus = 1
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
