from __future__ import annotations

import argparse
import os

import pytest
from detectron2.config import get_cfg

from iou_d2.commands.arguments import add_config_arguments, config_of, is_key

CONFIG = "configs/quick/retinanet_own_data.yaml"


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    add_config_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize("option", ["--config", "--config-file"])
def test_the_config_is_the_named_one_with_its_own_datasets(option):
    cfg = config_of(parse(option, CONFIG))
    assert "RetinaNet" in cfg.MODEL.META_ARCHITECTURE
    assert cfg.DATASETS.TRAIN == get_cfg().DATASETS.TRAIN


def test_a_name_becomes_the_path_of_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = parse("--config", "quick/retinanet_own_data").config_file
    assert path.endswith(CONFIG) and os.path.isfile(path)
    with pytest.raises(SystemExit):
        parse("--config", "quick/retinanet_own")
    error = capsys.readouterr().err
    assert "There is no config file quick/retinanet_own. The nearest of" in error


@pytest.mark.parametrize(
    "argv",
    [
        ["--train", "coco:a.json", "voc:B", "--test", "c", "SEED", "3", "SOLVER.MAX_ITER", "2"],
        ["--test", "c", "--train", "coco:a.json", "voc:B", "SOLVER.MAX_ITER", "2", "SEED", "3"],
        ["--train", "coco:a.json", "SEED", "3", "--test", "c", "--resume", "SOLVER.MAX_ITER", "2"],
        ["--train", "coco:a.json", "--train", "voc:B", "--test", "c", "--resume"]
        + ["SEED", "3", "SOLVER.MAX_ITER", "2"],
    ],
)
def test_several_names_and_pairs_in_any_order(argv):
    cfg = config_of(parse("--config", CONFIG, *argv))
    wanted = ("coco:a.json", "voc:B") if "voc:B" in argv else ("coco:a.json",)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (wanted, ("c",))
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == (3, 2)


def test_options_win_over_pairs_and_pairs_take_any_value():
    pairs = ["DATASETS.TEST", "('d',)", "TEST.DETECTIONS_PER_IMAGE", "-1", "MODEL.WEIGHTS", ""]
    cfg = config_of(parse("--config", CONFIG, "--test", "c", *pairs))
    assert cfg.DATASETS.TEST == ("c",) and cfg.TEST.DETECTIONS_PER_IMAGE == -1
    assert config_of(parse("--config", CONFIG, *pairs)).DATASETS.TEST == ("d",)


def test_a_key_where_a_name_should_stand_is_said(capsys):
    with pytest.raises(SystemExit):
        parse("--train", "SOLVER.MAX_ITER", "2")
    assert "--train takes at least one DATASET, but SOLVER.MAX_ITER is a key." in (
        capsys.readouterr().err
    )


def test_names_of_camera_files_and_of_files_that_are_there_are_no_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_key("TEST.AUG.ENABLED") and is_key("SEED") and is_key("MODEL.WEIGHTS")
    assert not any(map(is_key, ["DSC_0001.JPG", "A.B.TIFF", "a.jpg", "coco:A.JSON", "*.JPG"]))
    (tmp_path / "SEED").touch()
    assert not is_key("SEED")


def test_one_parse_leaves_nothing_to_the_next():
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    parser.parse_args(["--train", "a", "SEED", "3"])
    again = parser.parse_args(["--train", "b"])
    assert (again.train, again.more_opts, again.opts) == (["b"], [], [])
