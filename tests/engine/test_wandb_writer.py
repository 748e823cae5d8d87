"""Curves on Weights & Biases, of which a stand-in takes what is logged."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from iou_d2 import get_config
from iou_d2.engine.config_checks import check_training
from iou_d2.engine.wandb_writer import wandb_writers
from iou_d2.errors import InputError


class StandIn(ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = object()
        self.settings, self.logged, self.finished = None, [], False

    class Error(Exception):
        pass

    def init(self, **settings):
        if settings["project"] == "nobody's":
            raise self.Error("no API key")
        self.settings = settings
        return self

    def log(self, values, step):
        assert not self.logged or step > self.logged[-1][0]  # as wandb demands
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def config(*overrides):
    return get_config("quick/vfnet_shapes", overrides)


def test_it_logs_what_metrics_json_gets(wandb, tmp_path):
    cfg = config("WANDB.PROJECT", "boxes", "OUTPUT_DIR", str(tmp_path / "run7"))
    writers = [*wandb_writers(cfg), JSONWriter(str(tmp_path / "metrics.json"))]
    with EventStorage() as storage:
        for iteration in range(60):
            storage.put_scalar("loss", float(iteration) ** 2)
            if iteration == 29:
                storage.put_scalar("bbox/AP", 12.5, smoothing_hint=False)
            if iteration % 20 == 19:
                for writer in writers:
                    writer.write()
            storage.step()
    for writer in writers:
        writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    expected = sorted((line.pop("iteration"), line) for line in lines)
    assert wandb.logged == expected and [step for step, _ in expected] == [19, 29, 39, 59]
    assert wandb.finished
    settings = wandb.settings
    assert (settings["project"], settings["name"]) == ("boxes", "run7")
    assert settings["config"]["SOLVER"]["MAX_ITER"] == cfg.SOLVER.MAX_ITER


def test_without_a_project_there_is_no_writer(wandb):
    assert wandb_writers(config()) == [] and wandb.settings is None


def test_why_it_does_not_start_is_said(wandb):
    with pytest.raises(InputError, match="Weights & Biases does not start: no API key"):
        wandb_writers(config("WANDB.PROJECT", "nobody's"))


def test_a_project_needs_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_training(config())
    with pytest.raises(InputError, match="WANDB.PROJECT is boxes, which needs the package wandb"):
        check_training(config("WANDB.PROJECT", "boxes"))
