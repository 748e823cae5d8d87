"""What a config says that no model and no training can follow: told before anything is built."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.utils import comm

from iou_d2.data.augmentation import build_augmentations
from iou_d2.detectors.dense import part_named
from iou_d2.detectors.test_time_augmentation import build_merge
from iou_d2.detectors.views import build_view_maker
from iou_d2.errors import InputError

from .annotation_checks import require_shapely
from .config_values import at_least, check_choices, check_expected_results, is_finite, value_of
from .precision import MEMORY_FORMATS, PRECISIONS
from .wandb_writer import check_wandb

# Architectures that read MODEL.PROPOSAL_GENERATOR, and those that read MODEL.ROI_HEADS.
_WITH_PROPOSALS = ("GeneralizedRCNN", "ProposalNetwork", "StandaloneIoUNet", "PanopticFPN")
_WITH_IOU_BRANCH = ("IoUNetROIHeads", "IoUNetCascadeROIHeads", "IoUNetRes5ROIHeads")
_WITH_ROI_HEADS = ("GeneralizedRCNN", "StandaloneIoUNet", "PanopticFPN")
_NUMBERS_OF_CANDIDATES = (
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
    "MODEL.RPN.PRE_NMS_TOPK_TEST",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN",
    "MODEL.RPN.POST_NMS_TOPK_TEST",
)
# Detectron2's word for no generator of proposals.
_PRECOMPUTED = "PrecomputedProposals"


def check_config(cfg: CfgNode, augments: bool = False) -> None:
    """Check what every use of a model reads: parts that are there, images, device.

    `augments`: whether this use does what TEST.AUG says. Raises InputError with the key, its value
    and what it may be.
    """
    _check_parts(cfg)
    _check_images(cfg)
    _check_device(cfg.MODEL.DEVICE)
    part_named(PRECISIONS, cfg.MODEL.PRECISION, "MODEL.PRECISION")
    part_named(MEMORY_FORMATS, cfg.MODEL.MEMORY_FORMAT, "MODEL.MEMORY_FORMAT")
    if cfg.MODEL.CALIBRATION:
        require_predicted_ious(cfg, "MODEL.CALIBRATION")
    at_least(cfg, "MODEL.RETINANET.NUM_CLASSES", 1)
    at_least(cfg, "MODEL.ROI_HEADS.NUM_CLASSES", 1)
    for key in ("INPUT.MIN_SIZE_TEST", "DATALOADER.NUM_WORKERS"):
        at_least(cfg, key, 0)
    for key in _NUMBERS_OF_CANDIDATES:
        at_least(cfg, key, 1)
    at_least(cfg, "INPUT.MAX_SIZE_TEST", 1)
    check_expected_results(cfg)
    if cfg.SEED + comm.get_world_size() > 2**32:  # each process adds its rank
        raise InputError(
            f"SEED is under {2**32 - comm.get_world_size() + 1}, or negative for another one each "
            f"time, but it is {cfg.SEED}."
        )
    if cfg.TEST.AUG.ENABLED and not augments:
        raise InputError(
            "TEST.AUG.ENABLED is True, but only `iou-d2 train`, `eval` and `detect` augment test "
            "images, and no exported model does: set it to False."
        )
    if cfg.TEST.AUG.ENABLED:
        build_view_maker(cfg)
        build_merge(cfg)


def check_training(cfg: CfgNode) -> None:
    """Check, beside `check_config`, what training alone reads.

    Raises InputError with the key, its value and what it may be.
    """
    check_config(cfg, augments=True)
    check_datasets(cfg, "DATASETS.TRAIN")
    if not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty: name the data to train on with --train.")
    check_choices(cfg)
    _check_solver(cfg)
    _check_fine_tuning(cfg)
    _check_training_images(cfg)
    check_wandb(cfg)


def _check_training_images(cfg: CfgNode) -> None:
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    if not sizes or not all(is_finite(size) and size >= 1 for size in sizes):
        raise InputError(f"INPUT.MIN_SIZE_TRAIN is {sizes}, but sides have at least 1 pixel.")
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2:
        raise InputError(
            f"INPUT.MIN_SIZE_TRAIN is {tuple(sizes)}, but with MIN_SIZE_TRAIN_SAMPLING 'range' it "
            "is the shortest and the longest side."
        )
    at_least(cfg, "INPUT.MAX_SIZE_TRAIN", 1)
    if cfg.INPUT.AUGMENTATIONS:
        build_augmentations(cfg, is_train=True)
    if cfg.INPUT.MASK_FORMAT == "polygon":
        require_shapely(cfg)


def check_datasets(cfg: CfgNode, key: str) -> None:
    """Check that DATASETS.TRAIN or DATASETS.TEST is a tuple of names, and not one name."""
    value = value_of(cfg, key)
    if isinstance(value, str):
        option = "--train" if key.endswith("TRAIN") else "--test"
        raise InputError(
            f"{key} is the text {value!r} and not a tuple of names: write {option} {value}, or "
            f"{key} \"('{value}',)\" with the comma."
        )
    wrong = [name for name in value if not isinstance(name, str) or not name]
    if wrong:
        raise InputError(f"{key} holds {wrong[0]!r}, which is no name of a dataset.")


def require_predicted_ious(cfg: CfgNode, what: str) -> None:
    """Raise an InputError, in which `what` needs them, where the detector predicts no IoUs."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture == "PointDetector":
        node = cfg.MODEL.POINT_DETECTOR
        predicts = (node.HEAD, node.QUALITY) == ("QualityHead", "iou")
    elif architecture in _WITH_ROI_HEADS:
        predicts = cfg.MODEL.ROI_HEADS.NAME in _WITH_IOU_BRANCH
    else:
        predicts = architecture in ("IoUAwareRetinaNet", "IoUAwareSSD")
    if not predicts:
        raise InputError(
            f"{what} needs predicted IoUs, as IoUAwareRetinaNet, IoUAwareSSD, IoU-Net and a "
            "QualityHead with MODEL.POINT_DETECTOR.QUALITY 'iou' have them; this "
            f"{architecture} has none."
        )


def _check_parts(cfg: CfgNode) -> None:
    architecture = cfg.MODEL.META_ARCHITECTURE
    _registered(META_ARCH_REGISTRY, architecture, "MODEL.META_ARCHITECTURE")
    _registered(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME, "MODEL.BACKBONE.NAME")
    name = cfg.MODEL.ANCHOR_GENERATOR.NAME
    _registered(ANCHOR_GENERATOR_REGISTRY, name, "MODEL.ANCHOR_GENERATOR.NAME")
    if architecture in _WITH_PROPOSALS:
        name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
        if name == _PRECOMPUTED:
            _check_precomputed(cfg)
        else:
            _registered(PROPOSAL_GENERATOR_REGISTRY, name, "MODEL.PROPOSAL_GENERATOR.NAME")
    if architecture in _WITH_ROI_HEADS:
        _check_roi_heads(cfg.MODEL.ROI_HEADS)


def _check_roi_heads(node: CfgNode) -> None:
    _registered(ROI_HEADS_REGISTRY, node.NAME, "MODEL.ROI_HEADS.NAME")
    if node.NAME in _WITH_IOU_BRANCH and node.MIN_SIZE_TEST > 0:
        raise InputError(
            f"MODEL.ROI_HEADS.MIN_SIZE_TEST is {node.MIN_SIZE_TEST}, but {node.NAME} leaves no box "
            "out for its size: set it to 0."
        )


def _check_precomputed(cfg: CfgNode) -> None:
    key, architecture = "MODEL.PROPOSAL_GENERATOR.NAME", cfg.MODEL.META_ARCHITECTURE
    if architecture == "ProposalNetwork":
        raise InputError(f"{key} is {_PRECOMPUTED!r}, of which ProposalNetwork learns nothing.")
    # StandaloneIoUNet learns without proposals.
    if architecture != "StandaloneIoUNet" and not cfg.MODEL.LOAD_PROPOSALS:
        raise InputError(
            f"{key} is {_PRECOMPUTED!r}, and these are read with MODEL.LOAD_PROPOSALS True alone."
        )


def require_detections(cfg: CfgNode) -> None:
    """Raise an InputError where a model detects nothing in a picture alone."""
    architecture, name = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if architecture == "ProposalNetwork":
        raise InputError("MODEL.META_ARCHITECTURE ProposalNetwork proposes boxes of no class.")
    if architecture in _WITH_ROI_HEADS and name == _PRECOMPUTED:
        raise InputError(
            f"MODEL.PROPOSAL_GENERATOR.NAME is {name!r}, but a picture has no proposals: such a "
            "model can be evaluated on a dataset alone."
        )


def _registered(registry: Any, name: str, key: str) -> None:
    names = sorted(known for known, _ in registry)
    if name not in names:
        raise InputError(f"{key} is one of {', '.join(names)}, but it is {name!r}.")


def _check_images(cfg: CfgNode) -> None:
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise InputError(
            f"INPUT.FORMAT is 'BGR' or 'RGB', but it is {cfg.INPUT.FORMAT!r}. Grey images are read "
            "as three equal channels."
        )
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        values = value_of(cfg, key)
        if len(values) != 3 or not all(is_finite(value) for value in values):
            raise InputError(f"{key} is three numbers, one a channel, but it is {list(values)}.")
    if min(cfg.MODEL.PIXEL_STD) <= 0:
        raise InputError(f"MODEL.PIXEL_STD is over 0, but it is {list(cfg.MODEL.PIXEL_STD)}.")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"MODEL.DEVICE is 'cpu', 'cuda' or 'cuda:N', but it is {name!r}.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and count and (device.index or 0) >= count:
        raise InputError(f"MODEL.DEVICE is {name!r}, but there are {count} GPUs, counted from 0.")


def _check_solver(cfg: CfgNode) -> None:
    at_least(cfg, "SOLVER.IMS_PER_BATCH", 1)
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {processes} processes "
            f"cannot share: make it a multiple of {processes}."
        )
    at_least(cfg, "SOLVER.MAX_ITER", 1)
    at_least(cfg, "SOLVER.CHECKPOINT_PERIOD", 1)
    for name in ("WARMUP_ITERS", "WARMUP_FACTOR", "GAMMA", "MOMENTUM", "WEIGHT_DECAY"):
        at_least(cfg, f"SOLVER.{name}", 0)
    at_least(cfg, "TEST.EVAL_PERIOD", 0)
    at_least(cfg, "VIS_PERIOD", 0)
    if not (is_finite(cfg.SOLVER.BASE_LR) and cfg.SOLVER.BASE_LR > 0):
        raise InputError(f"SOLVER.BASE_LR is over 0 and finite, but it is {cfg.SOLVER.BASE_LR}.")
    steps = list(cfg.SOLVER.STEPS)
    if not all(is_finite(step) and step >= 0 for step in steps) or steps != sorted(steps):
        raise InputError(f"SOLVER.STEPS are rising iterations, but they are {tuple(steps)}.")


def _check_fine_tuning(cfg: CfgNode) -> None:
    for key in ("FREEZE", "LR_FACTORS"):
        if not isinstance(cfg.SOLVER[key], (list, tuple)):
            raise InputError(f"SOLVER.{key} is a list, but it is {cfg.SOLVER[key]!r}.")
    for name in cfg.SOLVER.FREEZE:
        if not isinstance(name, str) or not name:
            raise InputError(f"SOLVER.FREEZE holds {name!r}, which is no name of parameters.")
    _check_lr_factors(cfg.SOLVER.LR_FACTORS)
    decay = cfg.SOLVER.EMA_DECAY
    if not (is_finite(decay) and 0 <= decay < 1):
        raise InputError(f"SOLVER.EMA_DECAY is at least 0 and under 1, but it is {decay}.")
    if decay and cfg.TEST.PRECISE_BN.ENABLED:
        raise InputError(
            f"SOLVER.EMA_DECAY is {decay} and TEST.PRECISE_BN.ENABLED is True, but precise "
            "statistics are those of the weights in training, not of their average: switch one off."
        )
    at_least(cfg, "SOLVER.PATIENCE", 0)
    if cfg.SOLVER.PATIENCE and not (cfg.TEST.EVAL_PERIOD and cfg.DATASETS.TEST):
        raise InputError(
            f"SOLVER.PATIENCE is {cfg.SOLVER.PATIENCE}, but nothing is evaluated while training: "
            "give TEST.EVAL_PERIOD, and DATASETS.TEST with --test."
        )


def _check_lr_factors(pairs: list) -> None:
    names = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InputError(
                f"SOLVER.LR_FACTORS holds {pair!r}, which is no pair such as "
                "['backbone.bottom_up', 0.1]."
            )
        name, factor = pair
        if not isinstance(name, str) or not name:
            raise InputError(f"SOLVER.LR_FACTORS holds {name!r}, which is no name of parameters.")
        if isinstance(factor, bool) or not is_finite(factor) or factor <= 0:
            raise InputError(
                f"SOLVER.LR_FACTORS has {factor!r} for {name!r}, but factors are over 0 and "
                "finite; SOLVER.FREEZE names what is not to learn."
            )
        names.append(name)
    if len(set(names)) < len(names):
        raise InputError(f"SOLVER.LR_FACTORS has one of the names {', '.join(names)} twice.")
