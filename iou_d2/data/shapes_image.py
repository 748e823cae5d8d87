"""One image of the `shapes` dataset, as a pure function of (seed, split, index, pixels).

Shape letters: P pixels a side, H and W of a crop, Q points of an outline. Boxes are XYXY in
absolute pixels: x1 is the leftmost covered column, x2 the rightmost plus 1; x2 - x1 counts columns.

An object's *mask* is all of it inside the image, also what something else hides: annotations come
from it. Its *paint* is the mask without the bite of an occluder that looks like what lies behind.
*Visible* is the paint that no later object covers.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

CLASSES = ("ellipse", "rectangle", "triangle", "star", "ring")

# Sizes are the longer side of the whole object's box as a share of the image side.
MIN_SIZE, MAX_SIZE = 1 / 16, 1 / 2
CROWD_MEMBER_SIZE = (1 / 20, 1 / 13)
MAX_OBJECTS = 7
MIN_VISIBLE = 0.5  # of an object's whole area; less would ask for boxes nobody can see
MAX_BOX_IOU = 0.6
PAIR_BOX_IOU = (0.3, 0.6)

EMPTY_SHARE = 0.04  # of the images have no object
CROWD_SHARE = 0.06  # of the images have a crowd region
PAIR_SHARE = 0.45  # of the tries put a second object of the same class on an earlier one
OUTSIDE_SHARE = 0.25  # of the tries may leave the image
BITE_SHARE = 0.2  # of the objects lose a side to an occluder
SOFT_SHARE = 0.3  # of the objects have one soft side
FADE_SHARE = 0.3  # of the objects have one side of low contrast


@dataclass(frozen=True)
class Placed:
    """An object in its place: (P, P) bool masks; `area` counts what is outside the image, too."""

    label: int
    crowd: bool
    size: float
    area: float
    box: tuple[int, int, int, int]
    mask: np.ndarray
    paint: np.ndarray


@dataclass(frozen=True)
class Annotation:
    """Ground truth of an object or of a crowd region: `mask` (P, P) bool and its tight `box`."""

    label: int
    crowd: bool
    box: tuple[int, int, int, int]
    mask: np.ndarray


def make_image(
    seed: int, split: int, index: int, pixels: int
) -> tuple[np.ndarray, list[Annotation]]:
    """Draw image `index` of a split: (P, P, 3) uint8 BGR and its annotations, back to front.

    Each image has its own generator: it depends neither on their number nor on their order. An
    empty image has no annotations.
    """
    rng = np.random.default_rng([seed, split, index])
    objects = _arrange(rng, pixels)
    ground_colour = rng.uniform(40, 215, 3)
    image = _texture(rng, pixels, pixels, ground_colour, contrast=20, unit=pixels / 3)
    for placed in objects:
        _paint(rng, image, placed, _distant_colour(rng, ground_colour))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), _annotate(objects)


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """XYXY extent of the True pixels of an (H, W) mask; (0, 0, 0, 0) when there are none."""
    if not mask.any():
        return 0, 0, 0, 0
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def box_iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """IoU of two XYXY boxes with positive area."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


def _annotate(objects: list[Placed]) -> list[Annotation]:
    """One annotation an object; all members of the crowd share one."""
    annotations = [Annotation(o.label, False, o.box, o.mask) for o in objects if not o.crowd]
    members = [o for o in objects if o.crowd]
    if members:
        mask = np.any([o.mask for o in members], axis=0)
        annotations.append(Annotation(members[0].label, True, tight_box(mask), mask))
    return annotations


# ---------------------------------------------------------------------------- places


def _arrange(rng: np.random.Generator, pixels: int) -> list[Placed]:
    """Choose the objects of an image, back to front, so that each stays visible enough."""
    if rng.random() < EMPTY_SHARE:
        return []
    placed = _arrange_crowd(rng, pixels) if rng.random() < CROWD_SHARE else []
    crowd_members = len(placed)
    visible = [o.paint for o in placed]
    wanted = int(rng.integers(2, MAX_OBJECTS + 1))
    for _ in range(8 * wanted):
        if len(placed) - crowd_members == wanted:
            break
        singles = placed[crowd_members:]
        pair = singles and rng.random() < PAIR_SHARE
        first = singles[rng.integers(len(singles))] if pair else None
        candidate = _second_of_pair(rng, pixels, first) if first else _single(rng, pixels)
        if first and not PAIR_BOX_IOU[0] <= box_iou(first.box, candidate.box) <= PAIR_BOX_IOU[1]:
            continue
        if _fits(candidate, placed, visible):
            visible = [v & ~candidate.paint for v in visible] + [candidate.paint]
            placed.append(candidate)
    return placed


def _arrange_crowd(rng: np.random.Generator, pixels: int) -> list[Placed]:
    """Many small objects of one class around one point."""
    label = int(rng.integers(len(CLASSES)))
    middle = rng.uniform(0.25, 0.75, 2) * pixels
    placed: list[Placed] = []
    for _ in range(40):
        size = rng.uniform(*CROWD_MEMBER_SIZE) * pixels
        centre = np.clip(rng.normal(middle, 0.1 * pixels), size / 2, pixels - size / 2)
        member = _place(rng, pixels, label, size, centre, crowd=True)
        if _fits(member, placed, [o.paint for o in placed], max_iou=0.15):
            placed.append(member)
    return placed


def _single(rng: np.random.Generator, pixels: int) -> Placed:
    # Triangular on a log scale: the smallest and the largest sizes are rare, as in photographs.
    size = pixels * MIN_SIZE * (MAX_SIZE / MIN_SIZE) ** rng.triangular(0, 0.7, 1)
    margin = 0 if rng.random() < OUTSIDE_SHARE else size / 2
    centre = rng.uniform(margin, pixels - margin, 2)
    return _place(rng, pixels, int(rng.integers(len(CLASSES))), size, centre)


def _second_of_pair(rng: np.random.Generator, pixels: int, first: Placed) -> Placed:
    """An object of the same class, about as large, near enough for the boxes to overlap."""
    size = np.clip(rng.uniform(0.7, 1.2) * first.size, MIN_SIZE * pixels, MAX_SIZE * pixels)
    angle = rng.uniform(0, 2 * np.pi)
    shift = rng.uniform(0.15, 0.55) * first.size * np.array([np.cos(angle), np.sin(angle)])
    x1, y1, x2, y2 = first.box
    centre = np.clip(np.array([x1 + x2, y1 + y2]) / 2 + shift, 0, pixels)
    return _place(rng, pixels, first.label, size, centre)


def _place(
    rng: np.random.Generator,
    pixels: int,
    label: int,
    size: float,
    centre: np.ndarray,
    crowd: bool = False,
) -> Placed:
    """Draw the masks of an object whose box has the longer side `size` around `centre` (x, y)."""
    outlines = [outline * size + centre for outline in _unit_outlines(rng, CLASSES[label])]
    mask = np.zeros((pixels, pixels), np.uint8)
    # fillPoly takes fixed point numbers (here 1/16 pixel); two outlines leave a hole between them.
    cv2.fillPoly(mask, [np.rint(o * 16).astype(np.int32) for o in outlines], 1, shift=4)
    mask = mask.astype(bool)
    areas = [cv2.contourArea(o.astype(np.float32)) for o in outlines]
    # fillPoly counts every touched pixel, which in a small object is much more than the area.
    area = max(areas[0] - sum(areas[1:]), np.count_nonzero(mask))
    paint = mask
    if not crowd and rng.random() < BITE_SHARE:
        reach = rng.uniform(0.45, 0.8)  # 1 is the edge of the box
        paint = mask & (_ramp(rng, pixels, pixels, centre, size / 2) < reach)
    return Placed(label, crowd, size, area, tight_box(mask), mask, paint)


def _fits(
    candidate: Placed,
    placed: list[Placed],
    visible: list[np.ndarray],
    max_iou: float = MAX_BOX_IOU,
) -> bool:
    """Whether `candidate`, painted last, leaves itself and all others visible and apart enough."""
    if candidate.paint.sum() < MIN_VISIBLE * candidate.area:
        return False
    if any(box_iou(candidate.box, other.box) > max_iou for other in placed):
        return False
    left = (np.count_nonzero(v & ~candidate.paint) for v in visible)
    return all(count >= MIN_VISIBLE * other.area for count, other in zip(left, placed))


def _unit_outlines(rng: np.random.Generator, name: str) -> list[np.ndarray]:
    """Outlines (Q, 2) of a squeezed and turned object, in a box around 0 with longer side 1."""
    squeeze = np.array([1, rng.uniform(0.65, 1)])
    if name == "rectangle":
        outlines = [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * squeeze]
    elif name == "triangle":
        outlines = [_circle(3) * squeeze]
    elif name == "star":
        radii = np.tile([1, rng.uniform(0.35, 0.5)], 5)
        outlines = [_circle(10) * radii[:, None] * squeeze]
    elif name == "ring":
        outlines = [_circle(60) * squeeze, _circle(60) * squeeze * rng.uniform(0.45, 0.65)]
    else:
        outlines = [_circle(60) * squeeze]
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outlines = [outline @ turn for outline in outlines]
    low, high = outlines[0].min(axis=0), outlines[0].max(axis=0)
    return [(outline - (low + high) / 2) / (high - low).max() for outline in outlines]


def _circle(points: int) -> np.ndarray:
    angles = 2 * np.pi * np.arange(points) / points
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


# ---------------------------------------------------------------------------- paint


def _paint(rng: np.random.Generator, image: np.ndarray, placed: Placed, colour: np.ndarray) -> None:
    """Blend an object into `image` (P, P, 3) float32, in place; sides may be soft or faint."""
    softness = max(0.6, 0.05 * placed.size)
    margin = int(np.ceil(3 * softness))
    x1, y1, x2, y2 = placed.box
    crop = (slice(max(0, y1 - margin), y2 + margin), slice(max(0, x1 - margin), x2 + margin))
    under = image[crop]
    height, width = under.shape[:2]
    # The ramps need the middle of the object in coordinates of the crop.
    middle = np.array([(x1 + x2) / 2 - crop[1].start, (y1 + y2) / 2 - crop[0].start])

    paint = placed.paint[crop].astype(np.float32)
    alpha = cv2.GaussianBlur(paint, (0, 0), 0.5)
    if rng.random() < SOFT_SHARE:
        ramp = np.clip(_ramp(rng, height, width, middle, placed.size / 2), 0, 1)
        alpha += ramp * (cv2.GaussianBlur(paint, (0, 0), softness) - alpha)
    if rng.random() < FADE_SHARE:
        ramp = np.clip(_ramp(rng, height, width, middle, placed.size / 2), 0, 1)
        alpha *= 1 - rng.uniform(0.4, 0.8) * ramp
    texture = _texture(rng, height, width, colour, contrast=35, unit=placed.size)
    under += alpha[..., None] * (texture - under)


def _ramp(
    rng: np.random.Generator, height: int, width: int, middle: np.ndarray, reach: float
) -> np.ndarray:
    """(H, W) float32 growing in a random direction: 0 at `middle` (x, y), 1 at `reach` from it."""
    angle = rng.uniform(0, 2 * np.pi)
    across = (np.arange(width) - middle[0]) * (np.cos(angle) / reach)
    down = (np.arange(height) - middle[1]) * (np.sin(angle) / reach)
    return across.astype(np.float32) + down.astype(np.float32)[:, None]


def _texture(
    rng: np.random.Generator,
    height: int,
    width: int,
    colour: np.ndarray,
    contrast: float,
    unit: float,
) -> np.ndarray:
    """(H, W, 3) float32 noise, stripes or checks around `colour`; their period suits `unit`."""
    period = max(4.0, rng.uniform(0.12, 0.4) * unit)
    zero = np.zeros(2)
    kind = rng.integers(4)
    if kind == 0:
        wave = np.sin(np.pi * _ramp(rng, height, width, zero, period / 2))
    elif kind == 1:
        wave = np.sign(np.sin(np.pi * _ramp(rng, height, width, zero, period / 2)))
    elif kind == 2:
        rows = np.sin(2 * np.pi * np.arange(height, dtype=np.float32) / np.float32(period))
        columns = np.sin(2 * np.pi * np.arange(width, dtype=np.float32) / np.float32(period))
        wave = np.sign(rows[:, None] * columns)
    else:
        wave = _noise(rng, height, width, period / 2)
    wave = 0.6 * wave + 0.4 * _noise(rng, height, width, 2.5)
    amplitude = rng.uniform(-contrast, contrast, 3).astype(np.float32)
    return colour.astype(np.float32) + wave.astype(np.float32)[..., None] * amplitude


def _noise(rng: np.random.Generator, height: int, width: int, grain: float) -> np.ndarray:
    """(H, W) float32 smooth noise between about -1 and 1 with grains of `grain` pixels."""
    grid = (int(np.ceil(height / grain)) + 1, int(np.ceil(width / grain)) + 1)
    coarse = rng.uniform(-1, 1, grid).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def _distant_colour(rng: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """A colour that differs visibly from the ground's."""
    while True:
        colour = rng.uniform(20, 235, 3)
        if np.linalg.norm(colour - ground) > 90:
            return colour
