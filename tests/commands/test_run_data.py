"""The test set of a finished run follows the classes of that run."""

from __future__ import annotations

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from coco_files import annotation, two_images, write
from iou_d2 import get_config
from iou_d2.commands.run_data import require_measurable, use_test_set
from iou_d2.config import set_class_names
from iou_d2.errors import InputError


@pytest.fixture
def cfg(tmp_path):
    """That of a run whose test set has cats (5) and dogs (9)."""
    cfg = get_config("configs/quick/retinanet_own_data.yaml")
    cfg.DATASETS.TEST = (f"coco:{write(tmp_path, two_images())}:{tmp_path / 'images'}",)
    return cfg


@pytest.mark.parametrize("orders", [(["dog", "cat"], ["cat", "dog"]), (["cat", "emu", "dog"],)])
def test_one_run_after_another(cfg, tmp_path, orders):
    for classes in (*orders, ["dog", "cat"]):
        set_class_names(cfg, classes)
        name = use_test_set(cfg, tmp_path / "clean")
        assert MetadataCatalog.get(name).thing_classes == classes
        found = [a["category_id"] for r in DatasetCatalog.get(name) for a in r["annotations"]]
        assert found == [classes.index("cat"), classes.index("dog")]


def test_other_classes_are_refused(cfg, tmp_path):
    set_class_names(cfg, ["cat", "emu"])
    with pytest.raises(InputError, match="MODEL.CLASS_NAMES has the classes cat, emu, but"):
        use_test_set(cfg, tmp_path / "clean")
    cfg.DATASETS.TEST = ()
    with pytest.raises(InputError, match="DATASETS.TEST is empty"):
        use_test_set(cfg, tmp_path / "clean")


def test_what_the_run_trusted_is_trusted_again(cfg, tmp_path):
    data = two_images()
    data["annotations"] = [annotation(i, [0.1, 0.1, 0.5, 0.5]) for i in range(1, 9)]
    write(tmp_path, data)
    with pytest.raises(InputError, match="TRUST_BOXES"):
        use_test_set(cfg, tmp_path / "clean")
    cfg.DATASETS.TRUST_BOXES = True
    assert DatasetCatalog.get(use_test_set(cfg, tmp_path / "clean"))


def test_expected_results_wait_for_no_ap_of_a_set_without_annotations(cfg, tmp_path):
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 30, 1]]
    use_test_set(cfg, tmp_path / "clean")
    require_measurable(cfg)
    DatasetCatalog.remove(cfg.DATASETS.TEST[0])
    MetadataCatalog.remove(cfg.DATASETS.TEST[0])
    data = two_images()
    del data["annotations"]
    write(tmp_path, data)
    use_test_set(cfg, tmp_path / "clean")
    with pytest.raises(InputError, match="EXPECTED_RESULTS .* which has no annotations"):
        require_measurable(cfg)
    cfg.TEST.EXPECTED_RESULTS = []
    require_measurable(cfg)
    cfg.SOLVER.PATIENCE = 2
    require_measurable(cfg, eval_only=True)
    with pytest.raises(InputError, match="SOLVER.PATIENCE waits .* which has no annotations"):
        require_measurable(cfg)
