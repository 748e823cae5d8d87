"""A resumed run sees the images that the first one would have seen next."""

from __future__ import annotations

import itertools
import logging

import pytest
from detectron2.data.samplers import TrainingSampler

from iou_d2.engine.train_data import ResumableSampler


def first(sampler: TrainingSampler, count: int) -> list[int]:
    return list(itertools.islice(iter(sampler), count))


@pytest.mark.parametrize("done", [0, 3, 7, 25])
def test_it_goes_on_where_it_was(done):
    whole = ResumableSampler(7)
    resumed = ResumableSampler(7)
    resumed.load_state_dict(whole.state_dict(done))
    assert first(resumed, 30) == first(whole, done + 30)[done:]


def test_it_goes_on_twice():
    whole, second, third = (ResumableSampler(5) for _ in range(3))
    second.load_state_dict(whole.state_dict(4))
    third.load_state_dict(second.state_dict(9))
    assert first(third, 20) == first(whole, 33)[13:]


def test_from_the_beginning_it_is_detectron2s():
    ours = ResumableSampler(11)
    theirs = TrainingSampler(11, seed=ours.state_dict(0)["seed"])
    assert first(ours, 40) == first(theirs, 40)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (None, "does not say where its data were: a new pass begins"),
        ({"seed": 1, "images": 4, "size": 9}, "had 9 training images and there are 7"),
    ],
)
def test_where_it_cannot_it_says_so(state, sentence, caplog):
    sampler = ResumableSampler(7)
    expected = first(sampler, 10)
    with caplog.at_level(logging.WARNING):
        sampler.load_state_dict(state)
    assert sentence in caplog.text
    assert first(sampler, 10) == expected
