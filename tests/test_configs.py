"""What configs descend from, and how often they say a thing."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

BASELINES = ("retinanet_", "faster_rcnn_", "atss_", "fcos_", "ssd")
METHODS = ("iou_retinanet_", "iou_net_", "vfnet_", "unitbox_", "refinedet_")
FILES = sorted(Path("configs").rglob("*.yaml"))


def bases_of(path: Path) -> list[Path]:
    """All files from which `path` descends."""
    bases = yaml.safe_load(path.read_text()).get("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    direct = [Path(os.path.normpath(path.parent / base)) for base in bases]
    return direct + [more for base in direct for more in bases_of(base)]


@pytest.mark.parametrize("path", [x for x in FILES if x.name.startswith(BASELINES)], ids=str)
def test_a_baseline_does_not_descend_from_a_method(path):
    bases = bases_of(path)
    assert bases and not [base for base in bases if base.name.startswith(METHODS)]


def test_the_solver_of_the_quick_configs_stands_once():
    counts = Counter(
        key
        for path in Path("configs/quick").glob("*.yaml")
        for key in yaml.safe_load(path.read_text()).get("SOLVER", {})
    )
    chosen_by_data = {"MAX_ITER", "IMS_PER_BATCH", "BASE_LR"}
    assert counts["OPTIMIZER"] == counts["CLIP_GRADIENTS"] == 1
    assert {key for key, count in counts.items() if count > 1} <= chosen_by_data
