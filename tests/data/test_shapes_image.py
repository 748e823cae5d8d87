"""The images of the generated dataset."""

from __future__ import annotations

import numpy as np
import pytest

from iou_d2.data import shapes_image
from iou_d2.data.shapes_image import CLASSES, make_image, tight_box

# pycocotools with NumPy 2, for every mask it decodes.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIXELS = 128


def loop_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Oracle: XYXY extent by a loop over all covered pixels."""
    x1 = y1 = 10**9
    x2 = y2 = -1
    for y, x in np.argwhere(mask).tolist():
        x1, y1, x2, y2 = min(x1, x), min(y1, y), max(x2, x), max(y2, y)
    return x1, y1, x2 + 1, y2 + 1


def test_boxes_are_the_extent_of_the_masks():
    for index in range(12):
        for annotation in make_image(3, 1, index, 96)[1]:
            assert annotation.box == loop_box(annotation.mask)


def test_tight_box_of_single_pixels_and_of_nothing():
    mask = np.zeros((5, 7), bool)
    assert tight_box(mask) == (0, 0, 0, 0)
    mask[4, 6] = True
    assert tight_box(mask) == (6, 4, 7, 5)
    mask[0, 2] = True
    assert tight_box(mask) == (2, 0, 7, 5)


def test_image_depends_on_seed_split_and_index_only():
    image, annotations = make_image(5, 0, 2, 64)
    again, _ = make_image(5, 0, 2, 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert annotations and all(a.mask.shape == (64, 64) for a in annotations)
    np.testing.assert_array_equal(image, again)
    for other in [(6, 0, 2), (5, 1, 2), (5, 0, 3)]:
        assert not np.array_equal(image, make_image(*other, 64)[0])


def test_objects_stay_visible():
    """Painted in order, each keeps half of its pixels; others and its occluder hide the rest."""
    kept = []
    for index in range(60):
        objects = shapes_image._arrange(np.random.default_rng([0, 0, index]), PIXELS)
        owner = np.full((PIXELS, PIXELS), -1)
        for i, placed in enumerate(objects):
            owner[placed.paint] = i
        kept += [(owner == i).sum() / placed.mask.sum() for i, placed in enumerate(objects)]
    assert min(kept) >= 0.5 and np.mean(np.array(kept) < 0.8) > 0.15


def test_an_object_changes_the_pixels_inside_its_box():
    """Pixels in boxes must differ from the ground more than the ground differs from itself."""
    inside, outside = [], []
    for index in range(30):
        image, annotations = make_image(0, 0, index, PIXELS)
        covered = np.any([a.mask for a in annotations], axis=0)
        if not annotations or covered.all():
            continue
        ground = np.median(image[~covered], axis=0)
        distance = np.linalg.norm(image - ground, axis=2)
        inside.append(distance[covered].mean())
        outside.append(distance[~covered].mean())
    assert np.mean(inside) > 2 * np.mean(outside)


def test_colour_does_not_tell_the_class():
    """The nearest mean colour of a class guesses the class of new objects no better than chance."""
    means, labels = [], []
    for index in range(150):
        image, annotations = make_image(0, 0, index, 64)
        for annotation in annotations:
            means.append(image[annotation.mask].mean(axis=0))
            labels.append(annotation.label)
    means, labels = np.array(means), np.array(labels)
    half = len(labels) // 2
    centres = [means[:half][labels[:half] == label].mean(axis=0) for label in range(len(CLASSES))]
    guesses = np.linalg.norm(means[half:, None] - np.array(centres), axis=2).argmin(axis=1)
    assert (guesses == labels[half:]).mean() < 0.32
