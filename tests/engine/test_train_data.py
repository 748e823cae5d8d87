"""A resumed run sees the images that the first one would have seen next."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter

import pytest
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import logger
from PIL import Image

from iou_d2 import get_config
from iou_d2.data.coco import register_coco
from iou_d2.data.coco_records import LazyRecords
from iou_d2.engine.train_data import ResumableSampler, TrainData, digest_of


def sampler_of(size: int, digest: str = "images") -> ResumableSampler:
    return ResumableSampler(size, digest)


def first(sampler: TrainingSampler, count: int) -> list[int]:
    return list(itertools.islice(iter(sampler), count))


@pytest.mark.parametrize("done", [0, 3, 7, 25])
def test_it_goes_on_where_it_was(done):
    whole, resumed = sampler_of(7), sampler_of(7)
    resumed.load_state_dict(whole.state_dict(done))
    assert first(resumed, 30) == first(whole, done + 30)[done:]


def test_it_goes_on_twice():
    whole, second, third = (sampler_of(5) for _ in range(3))
    second.load_state_dict(whole.state_dict(4))
    third.load_state_dict(second.state_dict(9))
    assert first(third, 20) == first(whole, 33)[13:]


def test_from_the_beginning_it_is_detectron2s():
    ours = sampler_of(11)
    theirs = TrainingSampler(11, seed=ours.state_dict(0)["seed"])
    assert first(ours, 40) == first(theirs, 40)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (None, "does not say where its data were: a new pass begins"),
        ({"seed": 1, "images": 4, "size": 9}, "had 9 training images and there are 7"),
        ({"seed": 1, "images": 4, "size": 7, "digest": "x"}, "had other training images, or these"),
    ],
)
def test_where_it_cannot_it_says_so(state, sentence, caplog):
    sampler = sampler_of(7)
    expected = first(sampler, 10)
    with caplog.at_level(logging.WARNING):
        sampler.load_state_dict(state)
    assert sentence in caplog.text
    assert first(sampler, 10) == expected


def test_an_older_checkpoint_that_has_the_number_alone_is_resumed():
    whole, resumed = sampler_of(7), sampler_of(7)
    state = whole.state_dict(5)
    del state["digest"]
    resumed.load_state_dict(state)
    assert first(resumed, 20) == first(whole, 25)[5:]


def coco_config(folder, names: list[str], image_folder: str = "images"):
    """That of a run on a COCO file with an object on each of these images."""
    (folder / image_folder).mkdir(parents=True)
    for name in names:
        Image.new("RGB", (64, 48)).save(folder / image_folder / name)
    box = {"category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
    data = {
        "images": [
            {"id": i, "file_name": x, "width": 64, "height": 48} for i, x in enumerate(names)
        ],
        "annotations": [{"id": i + 1, "image_id": i, **box} for i in range(len(names))],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "train.json").write_text(json.dumps(data))
    cfg = get_config("retinanet_R_50_FPN_1x.yaml")
    file = folder / "train.json"
    cfg.DATASETS.TRAIN = (register_coco(file, folder / image_folder, folder / "clean"),)
    cfg.SOLVER.IMS_PER_BATCH = 1
    return cfg


def test_other_images_of_the_same_number_begin_a_new_pass(tmp_path, caplog):
    names = ["a.png", "b.png", "c.png"]
    cfg = coco_config(tmp_path / "first", names)
    before = TrainData(cfg).state_dict(2)
    others = {
        "another set": (tmp_path / "second", names),
        "another folder": (tmp_path / "first" / "third", names, "pictures"),
    }
    for what, place in others.items():
        caplog.clear()
        data = TrainData(coco_config(*place))
        data.load_state_dict(before)
        assert "a new pass begins" in caplog.text and data.sampler.start == 0, what
    caplog.clear()
    same = TrainData(cfg)
    same.load_state_dict(before)
    assert "a new pass" not in caplog.text and same.sampler.start == 2


def test_the_digest_of_records_is_that_of_their_files(tmp_path):
    cfg = coco_config(tmp_path, ["a.png", "b.png"])
    lazy, names = TrainData(cfg)._dataset, cfg.DATASETS.TRAIN
    assert isinstance(lazy, LazyRecords)
    assert digest_of(names, lazy) == digest_of(names, list(lazy))
    assert digest_of(names, lazy) != digest_of(names, list(lazy)[::-1])


@pytest.mark.parametrize("keep_empty", [False, True])
def test_a_coco_file_gives_what_detectron2_gives(tmp_path, caplog, monkeypatch, keep_empty):
    flags = [[0, 0, 1], [], [1], [0]]  # iscrowd of the objects of each image
    numbered = enumerate((i, crowd) for i, crowds in enumerate(flags) for crowd in crowds)
    data = {
        "images": [
            {"id": 9 - i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(4)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
        "annotations": [
            {"id": n + 1, "image_id": 9 - i, "category_id": (3, 8)[n % 2], "iscrowd": crowd}
            | {"bbox": [4, 4, 20 + n, 20], "area": 400}
            for n, (i, crowd) in numbered
        ],
    }
    for i in range(4):
        Image.new("RGB", (64, 48)).save(tmp_path / f"{i}.png")
    (tmp_path / "train.json").write_text(json.dumps(data))
    name = register_coco(tmp_path / "train.json", None, tmp_path / "clean")
    cfg = get_config("retinanet_R_50_FPN_1x.yaml")
    cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = (name,), not keep_empty
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 1
    monkeypatch.setattr(logger, "_LOG_COUNTER", Counter())  # of what is told once in a process
    with caplog.at_level(logging.INFO):
        expected = get_detection_dataset_dicts([name], filter_empty=not keep_empty)
        told = [record.getMessage() for record in caplog.records]
        caplog.clear()
        monkeypatch.setattr(logger, "_LOG_COUNTER", Counter())
        found = TrainData(cfg)
    assert isinstance(found._dataset, LazyRecords)
    assert list(found._dataset) == expected and len(expected) == (4 if keep_empty else 2)
    assert [record.getMessage() for record in caplog.records] == told
    batches = list(itertools.islice(iter(found), 4 * len(expected)))
    assert {b["image_id"] for (b,) in batches} == {record["image_id"] for record in expected}
