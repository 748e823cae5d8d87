from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from iou_d2.engine.best_checkpoint import BestCheckpoint
from iou_d2.engine.checkpoint import SafeCheckpointer


class Part:
    """Stands for the trainer, whose state holds that of the best checkpoint."""

    def __init__(self):
        self.best = None

    def state_dict(self):
        return {"best": self.best.state_dict()}


def best_in(folder, patience: int = 0, period: int = 10) -> BestCheckpoint:
    folder.mkdir(exist_ok=True)
    part, model = Part(), nn.Linear(1, 1)
    checkpointer = SafeCheckpointer(model, str(folder), trainer=part)
    part.best = BestCheckpoint(checkpointer, "first", period, patience)
    return part.best


def see(best: BestCheckpoint, aps: list[float], start: int = 1) -> list[bool]:
    """Evaluations every ten iterations, whose weights are the number of the evaluation."""
    over = []
    for number, ap in enumerate(aps, start):
        best.checkpointer.model.weight.data.fill_(number)
        best.see({"bbox": {"AP": ap}, "localization": {}}, 10 * number)
        over.append(best.is_over(10 * number))
    return over


NAN = math.nan


@pytest.mark.parametrize(
    ("aps", "number", "ap"),
    [
        ([1.0, 3.0, 2.0], 2, 3.0),
        ([3.0, 3.0, 3.0], 1, 3.0),  # the earlier of equal ones
        ([0.0], 1, 0.0),
        ([NAN, 0.0, NAN], 2, 0.0),
        ([2.0, NAN, 1.0], 1, 2.0),
        ([2.0, math.inf], 1, 2.0),
        ([-1.0, -2.0], 1, -1.0),
    ],
)
def test_the_file_is_that_of_the_highest_ap(tmp_path, aps, number, ap):
    best = best_in(tmp_path)
    see(best, aps)
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["model"]["weight"].item() == number and saved["iteration"] == 10 * number - 1
    assert saved["trainer"]["best"]["ap"] == best.ap == ap
    assert best.record() == {
        "best": {"AP": ap, "iterations": 10 * number},
        "stopped_early_after": None,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["model_best.pth"]  # not the last one


@pytest.mark.parametrize("results", [{}, {"bbox": {}}, {"bbox": {"AP": NAN}}, {"first": {}}])
def test_without_an_ap_there_is_no_best(tmp_path, results):
    best = best_in(tmp_path)
    best.see(results, 10)
    assert best.ap is None and best.record()["best"] is None
    assert list(tmp_path.iterdir()) == []


def test_of_several_sets_the_first_counts(tmp_path):
    best = best_in(tmp_path)
    best.see({"other": {"bbox": {"AP": 9.0}}, "first": {"bbox": {"AP": 4.0}}}, 10)
    assert best.ap == 4.0


def test_patience_counts_evaluations_without_a_better_one(tmp_path):
    assert see(best_in(tmp_path / "a", 2), [5, 4, 5, 9]) == [False, False, True, False]
    assert see(best_in(tmp_path / "b", 1), [1, 2, 3, 3]) == [False, False, False, True]
    assert see(best_in(tmp_path / "c", 0), [5, 4, 3, 2]) == [False] * 4
    aps = [NAN, NAN, NAN, 0.0, NAN, NAN]  # nothing to better before the first number
    assert see(best_in(tmp_path / "d", 2), aps) == [False] * 5 + [True]


def test_a_resumed_run_knows_the_best_also_of_evaluations_after_its_checkpoint(tmp_path):
    first = best_in(tmp_path)
    see(first, [1.0])
    state = first.state_dict()  # of the last checkpoint, before the better evaluation
    see(first, [5.0], start=2)
    resumed = best_in(tmp_path, patience=2)
    resumed.load_state_dict(state)
    assert (resumed.ap, resumed.iterations) == (5.0, 20)
    assert see(resumed, [4.0, 4.5], start=3) == [False, True]
    assert torch.load(tmp_path / "model_best.pth")["model"]["weight"].item() == 2


def test_a_file_of_an_earlier_training_is_not_the_best_of_this_one(tmp_path):
    see(best_in(tmp_path), [50.0])
    fresh = best_in(tmp_path)
    state = fresh.state_dict()
    resumed = best_in(tmp_path)
    resumed.load_state_dict(state)  # killed before its first evaluation
    assert resumed.ap is None
    see(resumed, [1.0])
    assert torch.load(tmp_path / "model_best.pth")["trainer"]["best"]["ap"] == 1.0
