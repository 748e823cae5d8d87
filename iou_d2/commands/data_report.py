"""What `iou-d2 data check` tells: of one dataset, of several together, of the configs for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from tabulate import tabulate

from iou_d2 import get_config
from iou_d2.config_files import config_names
from iou_d2.data import statistics
from iou_d2.data.classes import difference, with_used_groups
from iou_d2.data.coverage import Matching, Resize, SquareResize, matching_of, resize_of, resized
from iou_d2.data.statistics import Objects
from iou_d2.errors import InputError

if TYPE_CHECKING:
    from iou_d2.commands.data import DataSet

# Those for a user's own data on few cores, and one of each kind for GPUs.
_CONFIGS = ("_own_data", "_small_objects", "_R_50_FPN_1x", "_facemask", "_faces")
_SHOWN_CLASSES = 40
_SAMPLE = 50_000  # objects: a share of them is within half a percent of that of all


class Judged(NamedTuple):
    """Configs that resize and match alike, on some objects."""

    names: list[str]
    matching: Matching
    share: float  # of objects that reach the threshold, in %
    low: float  # 5th percentile of what is measured
    median: float
    shortest: float  # side after the resize, in pixels
    size: float  # median of sqrt(width * height) there


def describe(found: DataSet, refusals: Sequence[str]) -> str:
    """All about one dataset; `refusals` are sentences about why it is refused."""
    objects, classes = found.objects, found.classes
    lines = [
        *refusals,
        f"Mended: {found.findings}." if found.findings else "Nothing had to be mended.",
        f"{len(found.dicts)} images, {len(objects.boxes)} objects of {len(classes)} classes, "
        f"{objects.crowds} crowds, {objects.empty_images} images without an object.",
    ]
    if not found.has_annotations:
        lines.append(
            "It gives no annotations. As a test set its detections are written and AP is left "
            "out; it is nothing to train on."
        )
    if not len(objects.boxes):
        return "\n".join([*lines, f"Classes: {_some(classes)}."])
    lines += ["", _class_table(objects, classes), ""]
    sizes = ", ".join(f"{n} {size}" for size, n in statistics.count_sizes(objects).items())
    lines += [f"By area of the box, with COCO's limits 32^2 and 96^2: {sizes}."]
    lines += [_percentile_table(objects)]
    lines += [f"Look at this: {hint}" for hint in statistics.hints(objects, classes)]
    lines += [_alike(names) for names in statistics.alike(classes)]
    return "\n".join(lines)


def together(sets: Sequence[DataSet], configs: dict[str, CfgNode]) -> Iterator[str]:
    """How the sets go together, and which of `configs` fit all of them, in parts."""
    if len(sets) > 1:
        yield "\n== The sets together"
        yield from map(_compare, *zip(*itertools.combinations(sets, 2)))
        for names in statistics.alike(itertools.chain(*(found.classes for found in sets))):
            if not any(set(names) <= set(found.classes) for found in sets):  # told already
                yield _alike(names)
    # Training uses all sets together; a config fits all of them or not.
    if any(len(found.objects.boxes) for found in sets):
        yield _coverage(statistics.joined([found.objects for found in sets]), configs)


def read_configs(names: Sequence[str] | None) -> dict[str, CfgNode]:
    """The configs `names`, or those that come with iou_d2 and are made for a user's own data.

    Raises InputError where one cannot be read.
    """
    if names is None:
        names = [name for name in config_names() if name.endswith(_CONFIGS)]
        names = [name for name in names if "standalone" not in name]  # trains no detector
        # Those that are made for a user's data come first, so that a group bears their name.
        names.sort(key=lambda name: not name.endswith("_own_data"))
    return {name: get_config(name, ["MODEL.DEVICE", "cpu"]) for name in names}


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_CLASSES
    return ", ".join(names[:_SHOWN_CLASSES]) + (f" and {more} more" if more > 0 else "")


def _alike(names: Sequence[str]) -> str:
    return f"Look at this: are these one class? {', '.join(map(repr, names))}"


def _class_table(objects: Objects, classes: Sequence[str]) -> str:
    counts, images = statistics.count_classes(objects, len(classes))
    order = np.argsort(-counts, kind="stable")[:_SHOWN_CLASSES]
    rows = [(classes[i], counts[i], images[i]) for i in order]
    table = tabulate(rows, ["class", "objects", "images"], disable_numparse=True)
    more = len(classes) - len(order)
    return table + (f"\n... and {more} classes with no more objects." if more else "")


def _percentile_table(objects: Objects) -> str:
    sides = objects.sides[(objects.sides > 0).all(axis=1)]
    values = {
        "width": sides[:, 0],
        "height": sides[:, 1],
        "sqrt(width * height)": np.sqrt(sides.prod(axis=1)),
        "width / height": sides[:, 0] / sides[:, 1],
    }
    rows = [
        (name, *(f"{value:.3g}" for value in statistics.percentiles(of)))
        for name, of in values.items()
    ]
    headers = ["in pixels of the images", *(f"{p} %" for p in statistics.PERCENTILES)]
    headers[1], headers[-1] = "least", "most"
    return tabulate(rows, headers, disable_numparse=True, stralign="right")


def _compare(first: DataSet, second: DataSet) -> str:
    lines = [f"{first.name} and {second.name} have {_class_difference(first, second)}"]
    files = [[record["file_name"] for record in found.dicts] for found in (first, second)]
    shared = statistics.shared_images(*files)
    if shared:
        lines.append(
            f"Look at this: {len(shared)} images of {second.name} are in {first.name}, too, the "
            f"first: {shared[0][1]} is {shared[0][0]}. Do not train on what you test on."
        )
    return "\n".join(lines)


def _class_difference(first: DataSet, second: DataSet) -> str:
    sets = (first, second)
    classes = with_used_groups(
        [found.classes for found in sets], [found.findings.groups for found in sets]
    )
    if classes[0] == classes[1]:
        return "the same classes."
    if sorted(classes[0]) == sorted(classes[1]):
        return "the same classes in another order; they are matched by name."
    text = (
        f"other classes: {difference(*classes)}. Training on both needs "
        "DATASETS.TRUST_CLASSES True, which takes all classes together."
    )
    if not set(classes[0]) & set(classes[1]):
        return f"{text} Neither can test a model of the other."
    for (model, known), (test, named) in itertools.permutations(zip(sets, classes)):
        unknown = [name for name in named if name not in known]
        if unknown:
            text += (
                f"\nA model of {model.name} does not know {_some(unknown)}: {test.name} tests it "
                "only with DATASETS.TRUST_CLASSES True, which leaves these out."
            )
        else:
            text += f"\nA model of {model.name} can be tested on {test.name}: classes go by name."
    return text


def _coverage(objects: Objects, configs: dict[str, CfgNode]) -> str:
    groups, unjudged = _grouped(configs)
    sample, note = _sampled(objects)
    rows = [_judge(sample, names, *key) for key, names in groups.items()]
    rows.sort(key=lambda row: (row.matching.title, -row.share, -row.low, -row.median))
    parts = ["\n== Which configs fit"]
    if rows:
        parts.append(
            "From the config's keys, at the middle of its training sizes; sides are in pixels "
            "after that resize.\nWhat a crop cuts off, and objects that compete for an anchor or a "
            f"point, are not looked at.{note}"
        )
    for title, group in itertools.groupby(rows, key=lambda row: row.matching.title):
        parts.append(f"\n{title}:\n{_matching_table(list(group))}")
    parts += [f"Not judged: {name}. {reason}" for name, reason in unjudged.items()]
    return "\n".join(parts)


def _grouped(
    configs: dict[str, CfgNode],
) -> tuple[dict[tuple[Resize | SquareResize, Matching], list[str]], dict[str, str]]:
    """Names of configs by how they resize and match; and why others cannot be judged."""
    groups: dict[tuple, list[str]] = {}
    unjudged = {}
    for name, cfg in configs.items():
        try:
            groups.setdefault((resize_of(cfg), matching_of(cfg)), []).append(name)
        except InputError as error:
            unjudged[name] = str(error)
    return groups, unjudged


def _sampled(objects: Objects) -> tuple[Objects, str]:
    """At most _SAMPLE objects drawn at random, and a sentence that says so."""
    number = len(objects.boxes)
    if number <= _SAMPLE:
        return objects, ""
    chosen = np.random.default_rng(0).choice(number, _SAMPLE, replace=False)
    sample = Objects(
        objects.boxes[chosen], objects.classes[chosen], objects.images[chosen], objects.sizes, 0
    )
    return sample, f"\nOf the {number} objects {_SAMPLE} were drawn at random for this."


def _judge(
    objects: Objects, names: list[str], resize: Resize | SquareResize, matching: Matching
) -> Judged:
    boxes, sizes = resized(objects, resize)
    sides = boxes[:, 2:] - boxes[:, :2]
    measured = matching.measure(boxes, sizes)
    return Judged(
        names,
        matching,
        100 * float((measured >= matching.threshold).mean()),
        *np.percentile(measured, [5, 50]).tolist(),
        float(sides.min()),
        float(np.median(np.sqrt(np.maximum(sides, 0).prod(axis=1)))),
    )


def _matching_table(rows: Sequence[Judged]) -> str:
    table = [
        (
            row.names[0] if len(row.names) == 1 else f"{row.names[0]} +{len(row.names) - 1}",
            f"{row.share:.1f}",
            f"{row.low:.3g}",
            f"{row.median:.3g}",
            f"{row.shortest:.1f}",
            f"{row.size:.1f}",
        )
        for row in rows
    ]
    reached = f"{rows[0].matching.reached}, %"
    headers = ["config (+ those like it)", reached, "5 % have less", "median"]
    headers += ["shortest side", "median size"]
    aligned = ("left", *["right"] * 5)
    return tabulate(table, headers, disable_numparse=True, colalign=aligned)
