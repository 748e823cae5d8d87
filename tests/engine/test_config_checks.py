from __future__ import annotations

import sys

import pytest

from iou_d2 import get_config
from iou_d2.config_files import config_names
from iou_d2.engine.config_checks import check_config, check_training
from iou_d2.errors import InputError

DATA = ("DATASETS.TRAIN", "('shapes_train',)")


@pytest.mark.parametrize("name", [name for name in config_names() if "Base-" not in name])
def test_every_config_of_ours_passes(name):
    check_training(get_config(name, ["MODEL.DEVICE", "cpu", *DATA]))


@pytest.mark.parametrize(
    "key, value",
    [
        ("INPUT.FORMAT", "L"),
        ("TEST.EXPECTED_RESULTS", "[['bbox', 'AP']]"),
        ("TEST.EXPECTED_RESULTS", "['bbox', 'AP', 38.5, 0.2]"),
        ("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', '38.5', 0.2]]"),
        ("INPUT.FORMAT", "YUV-BT.601"),
        ("TEST.AUG.ENABLED", "True"),
        ("MODEL.PIXEL_MEAN", "[1.0]"),
        ("MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"),
        ("MODEL.META_ARCHITECTURE", "RetinaNett"),
        ("MODEL.BACKBONE.NAME", "build_nothing"),
        ("MODEL.ROI_HEADS.NAME", "IoUNet"),
        ("MODEL.DEVICE", "tpu"),
        ("MODEL.DEVICE", "mps"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "0"),
        ("INPUT.MIN_SIZE_TEST", "-1"),
        ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "-1"),
        ("MODEL.RPN.PRE_NMS_TOPK_TEST", "0"),
        ("MODEL.RPN.POST_NMS_TOPK_TRAIN", "0"),
    ],
)
def test_what_no_model_can_follow_is_named(key, value):
    cfg = get_config("quick/faster_rcnn_shapes", ["MODEL.DEVICE", "cpu", key, value])
    with pytest.raises(InputError, match=key):
        check_config(cfg)


def test_iou_net_leaves_no_box_out_for_its_size():
    pairs = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.MIN_SIZE_TEST", "2.0"]
    check_config(get_config("quick/faster_rcnn_shapes", pairs))
    with pytest.raises(InputError, match="MIN_SIZE_TEST is 2.0, but IoUNetROIHeads"):
        check_config(get_config("quick/iou_net_shapes", pairs))


def test_what_augments_test_images_checks_how():
    views = ["MODEL.DEVICE", "cpu", "TEST.AUG.ENABLED", "True"]
    check_config(get_config("quick/faster_rcnn_shapes", views), augments=True)
    for key, value in (("MIN_SIZES", "()"), ("BOX_SIZES", "[[0, 9]]"), ("MERGE", "mean")):
        cfg = get_config("quick/faster_rcnn_shapes", [*views, f"TEST.AUG.{key}", value])
        with pytest.raises(InputError, match=f"TEST.AUG.{key}"):
            check_config(cfg, augments=True)


@pytest.mark.parametrize(
    "key, value",
    [
        ("DATASETS.TRAIN", "('coco:x')"),
        ("DATASETS.TRAIN", "()"),
        ("SOLVER.IMS_PER_BATCH", "0"),
        ("SOLVER.MAX_ITER", "0"),
        ("SOLVER.MAX_ITER", "-3"),
        ("SOLVER.BASE_LR", "float('nan')"),
        ("SOLVER.BASE_LR", "-0.1"),
        ("SOLVER.WARMUP_ITERS", "-1"),
        ("SOLVER.STEPS", "(30, 20)"),
        ("SOLVER.CHECKPOINT_PERIOD", "0"),
        ("SOLVER.OPTIMIZER", "Adam"),
        ("TEST.EVAL_PERIOD", "-1"),
        ("INPUT.MIN_SIZE_TRAIN", "()"),
        ("INPUT.MIN_SIZE_TRAIN", "('a',)"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "foo"),
        ("INPUT.MAX_SIZE_TRAIN", "0"),
        ("INPUT.RANDOM_FLIP", "both"),
        ("INPUT.AUGMENTATIONS", '["shortest_edge", ["flip"]]'),
        ("DATALOADER.SAMPLER_TRAIN", "foo"),
        ("SOLVER.STEPS", "(1.5, 'a')"),
        ("SOLVER.LR_SCHEDULER_NAME", "foo"),
        ("SOLVER.WARMUP_METHOD", "foo"),
        ("SEED", "3000000000000"),
    ],
)
def test_what_no_training_can_follow_is_named(key, value):
    cfg = get_config("quick/faster_rcnn_shapes", ["MODEL.DEVICE", "cpu", *DATA])
    if "nan" in value:
        cfg.SOLVER.BASE_LR = float("nan")
    else:
        cfg.merge_from_list([key, value]) if value != "('coco:x')" else None
        cfg.DATASETS.TRAIN = "coco:x" if value == "('coco:x')" else cfg.DATASETS.TRAIN
    with pytest.raises(InputError, match=key):
        check_training(cfg)


@pytest.mark.parametrize(
    "key, value",
    [
        ("FREEZE", [3]),
        ("FREEZE", [""]),
        ("FREEZE", [["backbone"]]),
        ("FREEZE", "backbone"),
        ("LR_FACTORS", ["backbone", 0.1]),
        ("LR_FACTORS", [["backbone"]]),
        ("LR_FACTORS", [[0.1, "backbone"]]),
        ("LR_FACTORS", [["", 0.1]]),
        ("LR_FACTORS", [["backbone", "0.1"]]),
        ("LR_FACTORS", [["backbone", 0]]),
        ("LR_FACTORS", [["backbone", -1.0]]),
        ("LR_FACTORS", [["backbone", True]]),
        ("LR_FACTORS", [["backbone", float("nan")]]),
        ("LR_FACTORS", [["backbone", float("inf")]]),
        ("LR_FACTORS", [["backbone", 10**400]]),
        ("LR_FACTORS", [["backbone", None]]),
        ("LR_FACTORS", [["a", 0.1], ["a", 0.2]]),
        ("LR_FACTORS", {"backbone": 0.1}),
        ("EMA_DECAY", 1.0),
        ("EMA_DECAY", -0.1),
        ("EMA_DECAY", float("nan")),
        ("EMA_DECAY", 10**400),
        ("PATIENCE", -1),
        ("PATIENCE", 3),  # without evaluations
    ],
)
def test_what_no_fine_tuning_can_follow_is_named(key, value):
    cfg = get_config("quick/faster_rcnn_shapes", ["MODEL.DEVICE", "cpu", *DATA])
    cfg.TEST.EVAL_PERIOD = 0
    cfg.SOLVER[key] = value
    with pytest.raises(InputError, match=f"SOLVER.{key}") as error:
        check_training(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value, switch",
    [
        ("INPUT.CROP.TYPE", "foo", "INPUT.CROP.ENABLED"),
        ("INPUT.MASK_FORMAT", "foo", "MODEL.MASK_ON"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "foo", "SOLVER.CLIP_GRADIENTS.ENABLED"),
    ],
)
def test_what_nobody_reads_is_not_checked(key, value, switch):
    pairs = ["MODEL.DEVICE", "cpu", *DATA, key, value, switch]
    check_training(get_config("quick/faster_rcnn_shapes", [*pairs, "False"]))
    with pytest.raises(InputError, match=f"{key} is one of .*, but it is '{value}'"):
        check_training(get_config("quick/faster_rcnn_shapes", [*pairs, "True"]))


@pytest.mark.parametrize(
    "key, values",
    [
        ("INPUT.RANDOM_FLIP", ("none", "vertical", "horizontal")),
        ("INPUT.CROP.TYPE", ("relative", "relative_range", "absolute", "absolute_range")),
        ("DATALOADER.SAMPLER_TRAIN", ("TrainingSampler", "RepeatFactorTrainingSampler")),
        ("SOLVER.LR_SCHEDULER_NAME", ("WarmupMultiStepLR", "WarmupCosineLR")),
        ("SOLVER.WARMUP_METHOD", ("linear", "constant")),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("value", "norm")),
        ("SEED", ("-1", "0", "4294967295")),
    ],
)
def test_what_detectron2_takes_is_taken(key, values):
    switches = ["INPUT.CROP.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.ENABLED", "True"]
    for value in values:
        pairs = ["MODEL.DEVICE", "cpu", *DATA, *switches, key, value]
        check_training(get_config("quick/faster_rcnn_shapes", pairs))


def test_a_crop_of_polygons_without_shapely_is_refused_before_the_data_are_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "shapely", None)
    pairs = ["MODEL.DEVICE", "cpu", *DATA, "MODEL.MASK_ON", "True", "INPUT.CROP.ENABLED", "True"]
    with pytest.raises(InputError, match="INPUT.CROP.ENABLED is True, .*pip install shapely"):
        check_training(get_config("quick/faster_rcnn_shapes", pairs))
    check_training(get_config("quick/faster_rcnn_shapes", [*pairs, "INPUT.MASK_FORMAT", "bitmask"]))


def test_precise_statistics_are_not_those_of_an_average():
    cfg = get_config("quick/faster_rcnn_shapes", ["MODEL.DEVICE", "cpu", *DATA])
    cfg.SOLVER.EMA_DECAY, cfg.TEST.PRECISE_BN.ENABLED = 0.9, True
    with pytest.raises(InputError, match="SOLVER.EMA_DECAY is 0.9 and TEST.PRECISE_BN"):
        check_training(cfg)


def test_patience_needs_evaluations_of_a_set():
    cfg = get_config("quick/faster_rcnn_shapes", ["MODEL.DEVICE", "cpu", *DATA])
    cfg.SOLVER.PATIENCE, cfg.TEST.EVAL_PERIOD = 2, 10
    check_training(cfg)
    cfg.DATASETS.TEST = ()
    with pytest.raises(InputError, match="SOLVER.PATIENCE is 2, but nothing is evaluated"):
        check_training(cfg)


def test_processes_share_the_batch(monkeypatch):
    monkeypatch.setattr("iou_d2.engine.config_checks.comm.get_world_size", lambda: 3)
    cfg = get_config("quick/faster_rcnn_shapes", ["MODEL.DEVICE", "cpu", *DATA])
    cfg.SOLVER.IMS_PER_BATCH = 4
    with pytest.raises(InputError, match="multiple of 3"):
        check_training(cfg)
