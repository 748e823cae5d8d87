"""A plan in a folder of its own."""

from __future__ import annotations

import pytest

from iou_d2.zoo import read_plan
from zoo_runs import CHAIN, PLAN


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "runs" / "zoo.yaml"
    path.parent.mkdir()
    path.write_text(PLAN)
    return read_plan(path)


@pytest.fixture
def chain(plan):
    """The same with a table of runs that go on from others."""
    plan.path.write_text(PLAN + CHAIN)
    return read_plan(plan.path)
