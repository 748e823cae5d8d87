"""What fails on an image while it is read names the image; unusual but good images are read."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.structures import BoxMode
from PIL import Image

from iou_d2 import add_iou_config
from iou_d2.data.mapper import CheckedDatasetMapper, truth_mapper
from iou_d2.errors import InputError

WIDTH, HEIGHT = 48, 32


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (HEIGHT,)
    cfg.INPUT.MIN_SIZE_TEST = HEIGHT
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def record(file: Path) -> dict:
    box = {"bbox": [4, 5, 20, 25], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    return {
        "file_name": str(file),
        "image_id": 17,
        "width": WIDTH,
        "height": HEIGHT,
        "annotations": [box],
    }


def ramp() -> np.ndarray:
    return np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)


def write_cut_image(file: Path, keep: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_modes_become_bgr_of_8_bits(tmp_path, cfg, mode, is_train):
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    red = Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0))
    grey = Image.new("L", (WIDTH, HEIGHT), 255)
    (grey if mode in ("L", "LA", "1") else red).convert(mode).save(file)
    mapped = CheckedDatasetMapper(cfg, is_train)(record(file))
    assert mapped["image_id"] == 17 and mapped["file_name"] == str(file)
    expected = [255, 255, 255] if mode in ("L", "LA", "1") else [0, 0, 255]
    assert mapped["image"].shape == (3, HEIGHT, WIDTH)
    assert mapped["image"].flatten(1).float().mean(1).tolist() == pytest.approx(expected, abs=1.5)
    if is_train:
        assert mapped["instances"].gt_boxes.tensor.tolist() == [[4, 5, 20, 25]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_is_an_error(tmp_path, cfg, dtype):
    file = tmp_path / "deep.tif"
    Image.fromarray(ramp().astype(dtype)).save(file)
    with pytest.raises(InputError, match=r"deep\.tif \(image_id 17\).*more than 8 bits"):
        CheckedDatasetMapper(cfg, True)(record(file))


def test_exif_rotation_is_applied(tmp_path, cfg):
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees, so that the stored size is height x width
    Image.new("RGB", (HEIGHT, WIDTH)).save(file, exif=exif)
    assert CheckedDatasetMapper(cfg, True)(record(file))["image"].shape == (3, HEIGHT, WIDTH)


def test_exif_rotation_that_the_annotations_ignore(tmp_path, cfg):
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(file, exif=exif)
    with pytest.raises(InputError, match=r"turned\.jpg .*is 48x32 .*EXIF turns it to 32x48"):
        CheckedDatasetMapper(cfg, True)(record(file))


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.9])
def test_cut_images_are_named(tmp_path, cfg, suffix, keep):
    file = tmp_path / f"cut.{suffix}"
    write_cut_image(file, 10**9)
    size = file.stat().st_size
    write_cut_image(file, keep if isinstance(keep, int) else int(keep * size))
    with pytest.raises(InputError, match=rf"cut\.{suffix} \(image_id 17\) cannot be used: .+"):
        CheckedDatasetMapper(cfg, True)(record(file))


def test_text_and_missing_files_are_named(tmp_path, cfg):
    file = tmp_path / "text.jpg"
    file.write_text("<html>404</html>")
    with pytest.raises(InputError, match=r"text\.jpg .*cannot identify image"):
        CheckedDatasetMapper(cfg, False)(record(file))
    with pytest.raises(InputError, match=r"gone\.jpg \(image_id 17\).*No such file"):
        CheckedDatasetMapper(cfg, False)(record(tmp_path / "gone.jpg"))


def test_loaders_stop_with_the_name(tmp_path, cfg):
    file = tmp_path / "cut.jpg"
    write_cut_image(file, 500)
    name = f"cut_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: [record(file)])
    cfg.DATASETS.TRAIN = (name,)
    train = build_detection_train_loader(cfg, mapper=CheckedDatasetMapper(cfg, is_train=True))
    with pytest.raises(InputError, match=r"cut\.jpg \(image_id 17\) cannot be used"):
        next(iter(train))
    cfg.DATALOADER.NUM_WORKERS = 1
    test = build_detection_test_loader(cfg, name, mapper=CheckedDatasetMapper(cfg, is_train=False))
    with pytest.raises(InputError, match=r"cut\.jpg \(image_id 17\) cannot be used"):
        next(iter(test))


def test_format_of_one_channel(tmp_path, cfg):
    file = tmp_path / "red.png"
    Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0)).save(file)
    cfg.INPUT.FORMAT = "L"
    image = CheckedDatasetMapper(cfg, is_train=True)(record(file))["image"]
    assert image.shape == (1, HEIGHT, WIDTH) and (image == 76).all()


def test_what_is_no_fault_of_the_file_is_named_and_keeps_its_type(tmp_path, cfg):
    file = tmp_path / "a.png"
    Image.new("RGB", (WIDTH, HEIGHT)).save(file)
    broken = record(file)
    del broken["annotations"][0]["bbox"]
    with pytest.raises(RuntimeError, match=r"a\.png \(image_id 17\): KeyError: 'bbox'"):
        CheckedDatasetMapper(cfg, is_train=True)(broken)


def test_test_images_with_their_truth(tmp_path, cfg):
    file = tmp_path / "a.png"
    Image.new("RGB", (WIDTH, HEIGHT)).save(file)
    cfg.INPUT.MIN_SIZE_TEST = 2 * HEIGHT
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.INPUT.CROP.ENABLED = cfg.MODEL.MASK_ON = True
    image = record(file)
    image["annotations"].append({**image["annotations"][0], "iscrowd": 1})
    original = copy.deepcopy(image)
    for _ in range(3):
        found = truth_mapper(cfg)(image)
        assert found["image"].shape == (3, 2 * HEIGHT, 2 * WIDTH)
        assert found["instances"].gt_boxes.tensor.tolist() == [[8, 10, 40, 50]]
        assert (found["height"], found["width"]) == (HEIGHT, WIDTH)
    assert image == original
    del image["annotations"]
    none = truth_mapper(cfg)(image)["instances"]
    assert none.gt_boxes.tensor.shape == (0, 4) and none.gt_classes.shape == (0,)


def test_a_side_of_a_thin_image_is_a_pixel_at_least(tmp_path, cfg):
    file = tmp_path / "thin.png"
    Image.new("RGB", (1200, 2)).save(file)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 128
    thin = {"file_name": str(file), "image_id": 1, "height": 2, "width": 1200}
    assert CheckedDatasetMapper(cfg, is_train=False)(thin)["image"].shape == (3, 1, 128)
    add_iou_config(cfg)
    cfg.INPUT.AUGMENTATIONS = ["shortest_edge", "flip"]
    assert CheckedDatasetMapper(cfg, is_train=False)(thin)["image"].shape == (3, 1, 128)


def test_the_truth_of_test_images_comes_with_the_proposals_of_tests(cfg):
    cfg.MODEL.LOAD_PROPOSALS = True
    mapper = truth_mapper(cfg).args[0]
    assert mapper.proposal_topk == cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
