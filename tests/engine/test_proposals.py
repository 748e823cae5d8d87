"""Files of proposals, and the keys that name them: what is wrong with them is told before a run."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.coco_evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from iou_d2 import get_config
from iou_d2.data.coco import register_coco
from iou_d2.engine.config_checks import check_config, require_detections
from iou_d2.engine.proposals import check_proposals
from iou_d2.engine.train_data import TrainData
from iou_d2.errors import InputError, MissingFileError
from iou_d2.evaluation import COCOLocalizationEvaluator

IDS = [3, 5, 8]
PRECOMPUTED = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
LOAD = ("MODEL.LOAD_PROPOSALS", "True")


@pytest.fixture
def dataset(tmp_path):
    """The name of a COCO dataset of three images."""
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in IDS],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400}
            | {"iscrowd": 0}
            for i in IDS
        ],
    }
    for i in IDS:
        Image.new("RGB", (64, 48)).save(tmp_path / f"{i}.png")
    (tmp_path / "train.json").write_text(json.dumps(data))
    name = register_coco(tmp_path / "train.json", tmp_path, tmp_path / "clean")
    yield name
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove(name)


def content_of(ids=IDS):
    return {
        "ids": list(ids),
        "boxes": [np.full((2, 4), i, dtype=np.float32) for i in ids],
        "objectness_logits": [np.array([-1.0, 2.0], dtype=np.float32) for _ in ids],
        "bbox_mode": 0,
    }


@pytest.fixture
def cfg_of(tmp_path, dataset):
    """A function: content of a file -> the config that trains on it."""

    def make(content):
        path = tmp_path / "proposals.pkl"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        cfg = get_config("faster_rcnn_R_50_FPN_1x", [*PRECOMPUTED, *LOAD])
        cfg.DATASETS.TRAIN, cfg.DATASETS.PROPOSAL_FILES_TRAIN = (dataset,), (str(path),)
        return cfg

    return make


@pytest.mark.parametrize("ids", [IDS, [*IDS, 9], ["8", "5", "3"]], ids=str)
def test_a_file_of_all_images_passes_and_detectron2_reads_it(cfg_of, ids):
    cfg = cfg_of(content_of(ids))
    check_proposals(cfg, ["TRAIN"])
    records = TrainData(cfg)._read()
    assert [record["image_id"] for record in records] == IDS
    for record in records:
        number = int(record["image_id"]) if isinstance(ids[0], int) else None
        assert record["proposal_objectness_logits"].tolist() == [2.0, -1.0]
        assert number is None or (record["proposal_boxes"] == number).all()


def test_the_names_of_detectron_pass(cfg_of):
    content = content_of()
    content["indexes"], content["scores"] = content.pop("ids"), content.pop("objectness_logits")
    check_proposals(cfg_of(content), ["TRAIN"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (content_of([3, 8]), "has no proposals for 1 images of coco:.*, such as .*id 5:"),
        ({**content_of(), "ids": [3, 5]}, "has no lists ids, boxes, objectness_logits of one"),
        ({**content_of(), "boxes": np.zeros((3, 4))}, "is no file of proposals"),
        ({"model": {}}, "is no file of proposals"),
        ({**content_of(), "run": print}, "is refused, and nothing in it was run"),
        (b"no pickle", "is damaged"),
        ([1, 2], "holds a list"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(cfg_of, content, sentence):
    with pytest.raises(InputError, match=f"proposals.pkl .*{sentence}"):
        check_proposals(cfg_of(content), ["TRAIN"])


@pytest.mark.parametrize("files", [(), "one.pkl", ("one.pkl", "two.pkl")])
def test_each_dataset_has_one_file(cfg_of, files):
    cfg = cfg_of(content_of())
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = files
    with pytest.raises(InputError, match="PROPOSAL_FILES_TRAIN is .* one file for each"):
        check_proposals(cfg, ["TRAIN"])


def test_a_missing_file_is_named_and_none_is_looked_for_without_the_key(cfg_of):
    cfg = cfg_of(content_of())
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = ("none.pkl",)
    with pytest.raises(MissingFileError, match="no file none.pkl"):
        check_proposals(cfg, ["TRAIN"])
    cfg.MODEL.LOAD_PROPOSALS = False
    check_proposals(cfg, ["TRAIN", "TEST"])


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (PRECOMPUTED, "read with MODEL.LOAD_PROPOSALS True alone"),
        ((*PRECOMPUTED, "MODEL.META_ARCHITECTURE", "ProposalNetwork"), "ProposalNetwork learns"),
    ],
)
def test_keys_that_do_not_go_together_are_named(keys, sentence):
    cfg = get_config("faster_rcnn_R_50_FPN_1x", ["MODEL.DEVICE", "cpu", *keys])
    with pytest.raises(InputError, match=f"PROPOSAL_GENERATOR.NAME is .*{sentence}"):
        check_config(cfg)


def test_a_whole_detector_passes():
    for config in ("faster_rcnn_R_50_FPN_1x", "retinanet_R_50_FPN_1x"):
        require_detections(get_config(config))
    keys = ["MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "StandaloneIoUNet", *PRECOMPUTED]
    check_config(get_config("iou_net_R_50_FPN_1x", keys))


def test_recall_and_file_are_detectron2s(dataset, tmp_path):
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for _ in IDS:
        boxes = torch.tensor([4.0, 4.0, 24.0, 24.0]) + 6 * torch.randn(9, 4, generator=generator)
        proposals = Instances((48, 64), proposal_boxes=Boxes(boxes))
        proposals.objectness_logits = torch.randn(9, generator=generator)
        outputs.append({"proposals": proposals})
    results = []
    for kind, options in ((COCOLocalizationEvaluator, {}), (COCOEvaluator, {"tasks": ("bbox",)})):
        evaluator = kind(dataset, output_dir=str(tmp_path / kind.__name__), **options)
        evaluator.reset()
        evaluator.process([{"image_id": i} for i in IDS], outputs)
        results.append(evaluator.evaluate())
    assert set(results[0]) == {"box_proposals"}
    assert str(results[0]) == str(results[1])  # some are NaN
    assert 0 < results[0]["box_proposals"]["AR@100"] < 100
    files = [tmp_path / x.__name__ for x in (COCOLocalizationEvaluator, COCOEvaluator)]
    ours, theirs = ((x / "box_proposals.pkl").read_bytes() for x in files)
    assert ours == theirs
