"""Datasets of FiftyOne, which is not installed here: a stand-in takes what it would take."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from PIL import Image

from iou_d2.errors import InputError
from iou_d2.report import Subject, check_dataset, measure, write_dataset
from iou_d2.report.fiftyone_dataset import field_names


class StandIn(ModuleType):
    """The part of the package that is used."""

    def __init__(self):
        super().__init__("fiftyone")
        self.__spec__ = object()
        self.datasets, self.fails = {"old": []}, False
        self.Sample, self.Detection, self.Detections = dict, dict, dict

    def list_datasets(self):
        if self.fails:
            raise ConnectionError("nobody answers")
        return list(self.datasets)

    def Dataset(self, name, persistent):
        assert persistent
        return StandInDataset(self.datasets, name)


class StandInDataset:
    def __init__(self, datasets, name):
        self.datasets, self.name = datasets, name
        datasets[name] = []

    def add_samples(self, samples):
        self.datasets[self.name] += samples
        if len(samples) > 2:
            raise KeyboardInterrupt

    def delete(self):
        del self.datasets[self.name]


@pytest.fixture
def fiftyone(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    return stand_in


def box(image, bbox, category=7, **more):
    return {"image_id": image, "category_id": category, "bbox": bbox, **more}


def truth_of(images=2):
    sizes = {"width": 200, "height": 100}
    annotations = [box("a", [20, 10, 40, 20]), box("b", [0, 0, 10, 10], iscrowd=1)]
    for index, annotation in enumerate(annotations):
        annotation.update(id=index + 1, area=annotation["bbox"][2] * annotation["bbox"][3])
    return {
        "images": [{"id": i, "file_name": f"{i}.png", **sizes} for i in "abc"[:images]],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cat"}],
    }


GOOD = box("a", [20, 10, 40, 10], score=0.5, pred_iou=0.75)


def subject(name, results, folder, **more):
    return Subject(
        **{"name": name, "truth": truth_of(), "results": results, "images": folder, **more}
    )


def write(subjects):
    write_dataset(subjects, [measure(x) for x in subjects], "new")


def test_objects_and_detections_are_in_parts_of_the_image(fiftyone, tmp_path):
    write([subject("x", [GOOD], tmp_path), subject("1.5", [], tmp_path)])
    first, second = fiftyone.datasets["new"]
    assert first["filepath"] == str((tmp_path / "a.png").resolve())
    half = {"confidence": 0.5, "cls_score": 0.5, "pred_iou": 0.75, "iou": 0.5, "error": "found"}
    found = {"label": "cat", "bounding_box": [0.1, 0.1, 0.2, 0.1], **half}
    assert first["x"]["detections"] == [found]
    assert first["of_1_5"]["detections"] == second["x"]["detections"] == []
    truth = {"label": "cat", "bounding_box": [0.1, 0.1, 0.2, 0.2]}
    assert first["ground_truth"]["detections"] == [
        {**truth, "iscrowd": False, "not_found_by": ["1.5"]}
    ]
    assert second["ground_truth"]["detections"][0]["iscrowd"]


def test_a_size_that_nobody_wrote_down_is_that_of_the_image(fiftyone, tmp_path):
    truth = truth_of()
    for image in truth["images"]:
        image.update(width=None, height=None)
    with pytest.raises(InputError, match="Nothing says how large the image .*a.png is"):
        write([subject("x", [GOOD], tmp_path, truth=truth)])
    for name in "ab":
        Image.new("RGB", (400, 100)).save(tmp_path / f"{name}.png")
    write([subject("x", [GOOD], tmp_path, truth=truth)])
    (found,) = fiftyone.datasets["new"][0]["x"]["detections"]
    assert found["bounding_box"] == [0.05, 0.1, 0.1, 0.1]


def test_half_a_dataset_is_removed(fiftyone, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write([subject("x", [GOOD], tmp_path, truth=truth_of(3))])
    assert list(fiftyone.datasets) == ["old"]


def test_mistakes_get_a_sentence(fiftyone, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="FiftyOne has a dataset old already"):
        check_dataset("old")
    with pytest.raises(InputError, match="and x lacks one of them"):
        write([subject("x", [GOOD], None)])
    turned = truth_of()
    turned["annotations"].reverse()
    for other in (truth_of(3), turned):
        pair = [subject("x", [], tmp_path), subject("y", [], tmp_path, truth=other)]
        with pytest.raises(InputError, match="one test set, but those of x and y differ"):
            write(pair)
    fiftyone.fails = True
    with pytest.raises(InputError, match="does not reach its database: nobody answers"):
        check_dataset("new")
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(InputError, match="needs the package fiftyone: `pip install fiftyone`"):
        check_dataset("new")


def test_names_of_fields_differ():
    names = field_names(["a b", "a-b", "tags", "_x", "größe"])
    assert names == ["a_b", "a_b_", "tags_", "of_x", "gr__e"]
