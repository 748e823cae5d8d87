from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import transforms
from PIL import Image

from iou_d2.runtime.description import ShortestEdge
from iou_d2.runtime.resize import resize


def pillow(image, size):
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.BILINEAR))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((48, 64), (80, 107)),
        ((300, 400), (80, 107)),
        ((128, 128), (64, 64)),
        ((60, 80), (60, 33)),
        ((60, 80), (7, 80)),
        ((1, 1), (5, 5)),
        ((5, 9), (1, 1)),
        ((48, 64), (48, 64)),
    ],
)
def test_it_is_pillows(old, new):
    image = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    found = resize(image, new)
    assert found.dtype == np.uint8 and found.shape == (*new, 3)
    np.testing.assert_array_equal(found, pillow(image, new))


def test_of_any_size_it_is_pillows_but_for_the_order_of_the_passes():
    generator = np.random.default_rng(0)
    equal = 0
    for _ in range(200):
        height, width, *new = generator.integers(1, 150, 4).tolist()
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        found, expected = resize(image, new), pillow(image, new)
        assert np.abs(found.astype(int) - expected).max() <= 1
        equal += np.array_equal(found, expected)
    assert equal > 100


def test_sizes_are_detectron2s():
    generator = np.random.default_rng(0)
    for _ in range(300):
        height, width, shortest, longest = generator.integers(20, 900, 4).tolist()
        augmentation = transforms.ResizeShortestEdge([shortest, shortest], longest)
        expected = augmentation.get_transform(np.empty((height, width, 3)))
        found = ShortestEdge(shortest, longest).size_of(height, width)
        assert found == (expected.new_h, expected.new_w)
    assert ShortestEdge(0, 1333).size_of(7, 2000) == (7, 2000)
    assert ShortestEdge(10, 100).size_of(1, 100000) == (1, 100)
