"""Train a detector, or evaluate one with --eval-only.

    iou-d2 train --config quick/iou_retinanet_shapes
    iou-d2 train --config vfnet_R_50_FPN_1x --train coco:train.json --test coco:val.json \\
        OUTPUT_DIR output/x SOLVER.IMS_PER_BATCH 8
    iou-d2 train --config output/x/config.yaml --eval-only MODEL.WEIGHTS output/x/model_final.pth

OUTPUT_DIR receives model_final.pth, metrics.json, log.txt, config.yaml and run.json.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from iou_d2.commands.arguments import add_config_arguments, config_of
from iou_d2.config import set_class_names
from iou_d2.data.register import class_names, register_dataset
from iou_d2.data.shapes import ensure_shapes
from iou_d2.engine.launch import launch
from iou_d2.engine.pretrained import check_start
from iou_d2.engine.run_record import describe_run, recorded
from iou_d2.engine.trainer import Trainer


def make_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=None if epilog else __doc__,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    add("--num-gpus", type=int, default=1, metavar="N", help="GPUs a machine; 0 is the CPU")
    add("--num-processes", type=int, default=1, metavar="N", help="CPU processes a machine")
    add("--num-machines", type=int, default=1, metavar="N")
    add("--machine-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    add(
        "--dist-url",
        default=default_argument_parser().get_default("dist_url"),
        metavar="URL",
        help="where processes meet: tcp://HOST:PORT of machine 0, or auto on a single machine",
    )
    add_config_arguments(parser)
    return parser


def main(argv: list[str] | None = None, epilog: str | None = None) -> None:
    """`epilog` stands below the arguments in --help, in place of what this module says."""
    args = make_parser(epilog).parse_args(argv)
    launch(
        run,
        (args,),
        num_gpus=args.num_gpus,
        num_processes=args.num_processes,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
    )


def run(args: argparse.Namespace) -> None:
    """What each process does."""
    cfg = setup(args)
    record = describe_run(cfg, args.config_file, [*args.more_opts, *args.opts])
    folder = Path(cfg.OUTPUT_DIR)
    if args.eval_only:
        with recorded(record, folder / "evaluation.json"):
            evaluate(cfg, args.resume, record)
        return
    with recorded(record, folder / "run.json", keep_earlier=args.resume):
        train(cfg, args.resume, record)


def train(cfg: CfgNode, resume: bool, record: dict) -> None:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    try:
        trainer.train()
    finally:  # results that are not the expected ones end the run, and are to be recorded too
        record["results"] = trainer.results


def evaluate(cfg: CfgNode, resume: bool, record: dict) -> None:
    model = Trainer.build_model(cfg)
    DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
        cfg.MODEL.WEIGHTS, resume=resume
    )
    record["results"] = results = Trainer.test(cfg, model)
    if comm.is_main_process():
        log_results(cfg, results)
        verify_results(cfg, results)


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of a run, with its datasets registered, its loggers made and its seed set."""
    # Only the main process says that CUDA is not there.
    if args.num_gpus == 0 or (comm.get_rank() > 0 and not torch.cuda.is_available()):
        args.opts = [*args.opts, "MODEL.DEVICE", "cpu"]
    cfg = config_of(args)
    if comm.get_world_size() > 1 and args.num_gpus > 0 and torch.cuda.is_available():
        require_cuda(cfg)
    # Before the data are read, so that what is mended in them stands in log.txt. Detectron2's
    # default_setup makes the first two again, which does nothing when it is called alike.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="iou_d2")
    use_datasets(cfg, args.eval_only)
    check_start(cfg, args.eval_only, args.resume)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def require_cuda(cfg: CfgNode) -> None:
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ValueError(
            f"Several processes with a GPU each cannot train on MODEL.DEVICE {cfg.MODEL.DEVICE}: "
            "give --num-gpus 0."
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


def log_results(cfg: CfgNode, results: dict) -> None:
    """Append the results of an evaluation to metrics.json, where training logs its own."""
    with open(os.path.join(cfg.OUTPUT_DIR, "metrics.json"), "a") as file:
        file.write(json.dumps(flatten_results_dict(results)) + "\n")


if __name__ == "__main__":
    main()
