"""`iou-d2 train`: trains a detector, or evaluates one, in as many processes as are wanted."""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from iou_d2.commands.arguments import config_of
from iou_d2.commands.errors import leaves_no_traceback
from iou_d2.commands.parsers.train import parse_args
from iou_d2.commands.run_data import Start, use_datasets
from iou_d2.commands.trained import fill, names_in, read_weights
from iou_d2.data.cleaning import write_text
from iou_d2.engine.checkpoint import remove_unfinished, split_weights
from iou_d2.engine.config_checks import check_config, check_datasets, check_training
from iou_d2.engine.launch import launch
from iou_d2.engine.lock import locked
from iou_d2.engine.pretrained import check_start, is_pretrained
from iou_d2.engine.run_record import describe_run, recorded
from iou_d2.engine.safe_load import read_checkpoint_file, read_class_names
from iou_d2.engine.trainer import Trainer
from iou_d2.errors import InputError


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    launch(
        run_process,
        (args,),
        num_gpus=args.num_gpus,
        num_processes=args.num_processes,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url or default_argument_parser().get_default("dist_url"),
    )


def run_process(args: argparse.Namespace) -> None:
    """What each process does."""
    cfg = read_config(args)
    start = start_of(cfg, args)
    with locked(cfg.OUTPUT_DIR):
        prepare(cfg, args, start)
        record = describe_run(cfg, args.config_file, [*args.more_opts, *args.opts])
        folder = Path(cfg.OUTPUT_DIR)
        if args.eval_only:
            with recorded(record, folder / "evaluation.json"):
                evaluate(cfg, args.trust_weights, record)
            return
        with recorded(record, folder / "run.json", keep_earlier=args.resume):
            train(cfg, args.resume, args.trust_weights, record)


def train(cfg: CfgNode, resume: bool, trust_weights: bool, record: dict) -> None:
    trainer = Trainer(cfg, trust_weights)
    trainer.resume_or_load(resume=resume)
    warn_of_what_starts_anew(trainer)
    try:
        trainer.train()
    finally:  # results that are not the expected ones end the run, and are to be recorded too
        record["results"] = trainer.results
        if trainer.best is not None:
            record.update(trainer.best.record())


def warn_of_what_starts_anew(trainer: Trainer) -> None:
    logger = logging.getLogger(__name__)
    mismatch = trainer.checkpointer.mismatch
    if mismatch is not None and not mismatch.is_whole:
        logger.warning(f"What the weights do not fill starts anew: {mismatch.sentence()}")
    anew = trainer.frozen_anew()
    if anew:
        logger.warning(
            f"SOLVER.FREEZE keeps {len(anew)} parameters as they were drawn at random, for no "
            f"weights were loaded into them, such as {anew[0]}."
        )


def evaluate(cfg: CfgNode, trust_weights: bool, record: dict) -> None:
    model = fill(Trainer.build_model(cfg), cfg, read_weights(cfg, trust_weights))
    record["results"] = results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        log_results(cfg, results)
        verify_results(cfg, results)


def read_config(args: argparse.Namespace) -> CfgNode:
    """The config of a run, checked as far as it can be without its data."""
    # Only the main process says that CUDA is not there.
    if args.num_gpus == 0 or (comm.get_rank() > 0 and not torch.cuda.is_available()):
        args.opts = [*args.opts, "MODEL.DEVICE", "cpu"]
    cfg = config_of(args)
    if args.eval_only:
        check_config(cfg, augments=True)
    else:
        check_training(cfg)
    check_datasets(cfg, "DATASETS.TEST")
    if comm.get_world_size() > 1 and args.num_gpus > 0 and torch.cuda.is_available():
        require_cuda(cfg)
    return cfg


def start_of(cfg: CfgNode, args: argparse.Namespace) -> Start:
    """What a run begins with: the last checkpoint in OUTPUT_DIR where it resumes and there is one,
    or else MODEL.WEIGHTS."""
    weights = cfg.MODEL.WEIGHTS
    if resumes(cfg, args):
        last = _last_checkpoint(cfg)
        weights = str(last.with_name(last.read_text(encoding="utf-8").strip()))
    if args.eval_only and not weights:
        raise InputError(
            "Nothing is trained that --eval-only could evaluate: give MODEL.WEIGHTS at the end of "
            "the command line."
        )
    if not weights or is_pretrained(weights):
        return Start(weights, [])
    path, _ = split_weights(weights)
    if args.trust_weights:
        return Start(weights, names_in(read_checkpoint_file(path, trust=True), weights))
    return Start(weights, read_class_names(path) or [])


def resumes(cfg: CfgNode, args: argparse.Namespace) -> bool:
    """Whether a run goes on from a checkpoint in OUTPUT_DIR: with --resume, where there is one."""
    return args.resume and _last_checkpoint(cfg).is_file()


def _last_checkpoint(cfg: CfgNode) -> Path:
    """The file that names it."""
    return Path(cfg.OUTPUT_DIR) / "last_checkpoint"


def prepare(cfg: CfgNode, args: argparse.Namespace, start: Start) -> None:
    """Complete the config with the data, and make the loggers and the seed of a run."""
    # Before the data are read, so that what is mended in them stands in log.txt.
    for name in ("fvcore", "detectron2", "iou_d2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    logging.getLogger("detectron2.engine.train_loop").addFilter(leaves_no_traceback)
    use_datasets(cfg, start, args.eval_only, resumes(cfg, args))
    check_start(cfg, start.weights, args.eval_only)
    if args.eval_only:
        cfg.MODEL.WEIGHTS = start.weights
    cfg.freeze()
    log_setup(cfg, args)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    if args.eval_only:
        return
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if comm.is_main_process():
        remove_unfinished(cfg.OUTPUT_DIR)


def log_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Log and write what Detectron2's `default_setup` does, but let an evaluation leave alone the
    config.yaml of the training, which later calls read."""
    logger = logging.getLogger("detectron2")
    logger.info(f"Rank of current process: {comm.get_rank()}. World size: {comm.get_world_size()}")
    logger.info(f"Environment info:\n{collect_env_info()}")
    logger.info(f"Command line arguments: {args}")
    logger.info(f"Running with full config:\n{cfg.dump()}")
    if comm.is_main_process():
        name = "evaluation_config.yaml" if args.eval_only else "config.yaml"
        write_text(Path(cfg.OUTPUT_DIR) / name, cfg.dump())


def require_cuda(cfg: CfgNode) -> None:
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        raise InputError(
            f"Several processes with a GPU each cannot train on MODEL.DEVICE {cfg.MODEL.DEVICE}: "
            "give --num-gpus 0."
        )


def log_results(cfg: CfgNode, results: dict) -> None:
    """Append the results of an evaluation to metrics.json, where training logs its own."""
    with open(os.path.join(cfg.OUTPUT_DIR, "metrics.json"), "a") as file:
        file.write(json.dumps(flatten_results_dict(results)) + "\n")
