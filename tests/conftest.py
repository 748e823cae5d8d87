"""What several test files need: small configs, and batches of random images with ground truth."""

from __future__ import annotations

import copy
import functools
import gc
import os

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from iou_d2 import config_files, config_merging, get_config

SMALL = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
    *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.RETINANET.NUM_CLASSES", "3"),
)


# By name they come last, and take so long that one of two processes would wait for the other.
FIRST = ("test_config.py", "test_package.py", "test_zoo.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish() -> None:
    """What is loaded by now stays to the end: the garbage collector need not look at it again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_configs_are_parsed_once():
    """A thousand tests read configs that come with iou_d2, which never change."""
    read = config_merging.read_config_file
    parsed_once = functools.cache(read)
    own = os.fspath(config_files.config_folder()) + os.sep

    def read_config_file(path: str) -> dict:
        whole = os.path.realpath(path)
        return copy.deepcopy(parsed_once(whole)) if whole.startswith(own) else read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_merging, "read_config_file", read_config_file)
        patch.setattr(config_files, "config_names", functools.cache(config_files.config_names))
        yield


@pytest.fixture
def small_cfg():
    """A function: config file -> its config with a backbone of a few thousand parameters."""

    def load(config_file: str, *overrides: str):
        cfg = get_config(config_file, [*SMALL, *overrides])
        return cfg

    return load


@pytest.fixture
def make_batch():
    """A function: (objects of each image, number of classes, side in px) -> batched inputs."""

    def make(objects: list[int], classes: int = 3, side: int = 96) -> list[dict]:
        generator = torch.Generator().manual_seed(0)
        batch = []
        for index, count in enumerate(objects):
            corner = torch.rand(count, 2, generator=generator) * side / 2
            size = 12 + torch.rand(count, 2, generator=generator) * (side / 2 - 12)
            truth = Instances((side, side))
            truth.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
            truth.gt_classes = torch.randint(classes, (count,), generator=generator)
            image = torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8)
            batch.append(
                {
                    "image": image,
                    "instances": truth,
                    "image_id": index,
                    "height": side,
                    "width": side,
                }
            )
        return batch

    return make


@pytest.fixture
def event_storage():
    """Detectron2's models write their scalars into the storage that is open."""
    with EventStorage() as storage:
        yield storage
