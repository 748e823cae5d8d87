"""Look at datasets before training on them.

    iou-d2 data check coco:train.json coco:val.json --output output/data_check

Tells what is refused or was mended, counts classes and sizes, compares the sets with each other,
says which configs fit, and draws some images with their boxes into pictures.png. Trains nothing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from iou_d2 import get_config
from iou_d2.commands.contact_sheet import draw_sheet
from iou_d2.config_files import config_names
from iou_d2.data import statistics
from iou_d2.data.coverage import matching_of, resize_of, resized
from iou_d2.data.images import read_header
from iou_d2.data.register import register_dataset
from iou_d2.data.shapes import ensure_shapes
from iou_d2.errors import InputError

# Those for a user's own data on few cores, and one of each kind for GPUs.
_CONFIGS = ("_own_data", "_small_objects", "_R_50_FPN_1x", "_facemask", "_faces")
_SHOWN_CLASSES = 40


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    check_parser = parser.add_subparsers(required=True, metavar="check").add_parser("check")
    add = check_parser.add_argument
    add("names", nargs="+", metavar="NAME", help="as in DATASETS.TRAIN, such as coco:train.json")
    add("--output", type=Path, default=Path("output/data_check"), metavar="FOLDER")
    add("--config", nargs="+", metavar="CONFIG", help="in place of those that come with iou_d2")
    arguments = parser.parse_args(argv)
    if not check(arguments.names, arguments.output, arguments.config):
        sys.exit(1)


def check(names: list[str], output: Path, configs: list[str] | None = None) -> bool:
    """Print all about the datasets `names`; whether none of them is refused."""
    sets: dict[str, list[dict]] = {}
    refused = False
    for name in names:
        print(f"\n== {name}")
        try:
            registered, dicts = _load(name, output)
        except InputError as error:
            print(f"Refused: {error}")
            refused = True
            continue
        fault = _image_fault(dicts)
        if fault:
            print(f"Refused: {fault}")
            refused = True
        _describe(registered, dicts)
        sets[registered] = dicts
    if len(sets) > 1:
        _compare(sets)
    if sets:
        # Training uses all sets together; a config fits all of them or not.
        objects = statistics.collect(list(itertools.chain(*sets.values())))
        _print_coverage(objects, configs)
        print(f"\nImages with their boxes: {draw_sheet(sets, output)}")
    return not refused


def _load(name: str, output: Path) -> tuple[str, list[dict]]:
    registered = register_dataset(name, output / "datasets")
    ensure_shapes(registered)
    try:
        dicts = DatasetCatalog.get(registered)
    except FileNotFoundError as error:  # of Detectron2's own datasets
        raise InputError(f"The dataset {name} is not there: {error}") from error
    if not MetadataCatalog.get(registered).get("thing_classes"):
        raise InputError(f"The dataset {name} has no object classes to detect.")
    for record in dicts:  # readers of other projects may leave the size out
        if "width" not in record or "height" not in record:
            header = read_header(record["file_name"])
            record["width"], record["height"] = header.width, header.height
    return registered, dicts


def _image_fault(dicts: list[dict]) -> str | None:
    """What is wrong with image files, in a sentence that names the first."""
    faults = []
    for record in dicts:
        said = record["width"], record["height"]
        try:
            header = read_header(record["file_name"])
        except InputError as error:
            faults.append(str(error))
            continue
        if (header.width, header.height) != said:
            faults.append(
                f"{record['file_name']} has {header.width}x{header.height} pixels, but its "
                f"annotations say {said[0]}x{said[1]}"
            )
    if not faults:
        return None
    return f"{len(faults)} of {len(dicts)} images cannot be used, the first: {faults[0]}."


def _describe(name: str, dicts: list[dict]) -> None:
    metadata = MetadataCatalog.get(name)
    classes = list(metadata.thing_classes)
    objects = statistics.collect(dicts)
    findings = metadata.get("findings")
    print(f"Mended: {findings}." if findings else "Nothing had to be mended.")
    print(
        f"{len(dicts)} images, {len(objects.boxes)} objects of {len(classes)} classes, "
        f"{objects.crowds} crowds, {objects.empty_images} images without an object."
    )
    if not len(objects.boxes):
        print("There is no object to learn: training on this set is refused.")
        return
    counts, images = statistics.count_classes(objects, len(classes))
    order = np.argsort(-counts, kind="stable")[:_SHOWN_CLASSES]
    rows = [(classes[i], counts[i], images[i]) for i in order]
    print("\n" + tabulate(rows, ["class", "objects", "images"], disable_numparse=True))
    if len(classes) > len(order):
        print(f"... and {len(classes) - len(order)} classes with fewer objects.")
    sizes = statistics.count_sizes(objects)
    print("\nBy area of the box: " + ", ".join(f"{n} {size}" for size, n in sizes.items()) + ".")
    print(_percentile_table(objects))
    for hint in statistics.hints(objects, classes):
        print(f"Look at this: {hint}")


def _percentile_table(objects: statistics.Objects) -> str:
    sides = objects.sides
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
    headers = ["pixels of the image, %", *map(str, statistics.PERCENTILES)]
    return tabulate(rows, headers, disable_numparse=True)


def _compare(sets: dict[str, list[dict]]) -> None:
    print("\n== The sets together")
    for first, second in itertools.combinations(sets, 2):
        ours, theirs = (MetadataCatalog.get(name).thing_classes for name in (first, second))
        if set(ours) == set(theirs):
            same = "the same classes"
            print(f"{first} and {second} have {same}.")
        for name, only in ((first, set(ours) - set(theirs)), (second, set(theirs) - set(ours))):
            if only:
                print(f"Only {name} has the classes {', '.join(sorted(only))}.")
        files = [[record["file_name"] for record in sets[name]] for name in (first, second)]
        shared = statistics.shared_images(*files)
        if shared:
            print(
                f"{len(shared)} images of {second} are in {first}, too, the first: "
                f"{shared[0][1]} is {shared[0][0]}. Do not train and test on them."
            )


def _print_coverage(objects: statistics.Objects, configs: list[str] | None) -> None:
    if not len(objects.boxes):
        return
    rows = []
    for names, resize, matching in _grouped(configs):
        boxes, sizes = resized(objects, resize)
        sides = boxes[:, 2:] - boxes[:, :2]
        middle = np.median(np.sqrt(sides.prod(axis=1)))
        rows.append((names, matching, 100 * matching(boxes, sizes).mean(), sides.min(), middle))
    rows.sort(key=lambda row: (row[1].meaning, -row[2]))
    print("\n== Which configs fit: the share of objects that have ...")
    table = [
        (_first_and_number(names), matching.meaning, *(f"{number:.1f}" for number in numbers))
        for names, matching, *numbers in rows
    ]
    headers = ["config", "at its training size", "share, %", "shortest side", "median size"]
    print(tabulate(table, headers, disable_numparse=True))
    print(
        "From the config's keys, at the middle of its training sizes, sides in pixels after the "
        "resize;\nobjects that are cut by a crop or compete for an anchor are not looked at. "
        "Compare the shares of\none kind with each other: anchors below the threshold are still "
        "given to an object that has none."
    )
    for meaning, group in itertools.groupby(rows, key=lambda row: row[1].meaning):
        best = next(group)
        print(f"Of those with {meaning}: {best[0][0]} covers most, {best[2]:.1f} %.")


def _grouped(configs: list[str] | None):
    """Configs that resize and match alike: their names, how they resize, how they match."""
    if configs is None:
        configs = [name for name in config_names() if name.endswith(_CONFIGS)]
        # Those that are made for a user's data come first, so that a group bears their name.
        configs.sort(key=lambda name: not name.endswith("_own_data"))
    groups: dict[tuple, list[str]] = {}
    for name in configs:
        cfg = get_config(name, ["MODEL.DEVICE", "cpu"])
        groups.setdefault((resize_of(cfg), matching_of(cfg)), []).append(name)
    return [(names, *key) for key, names in groups.items()]


def _first_and_number(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it"


if __name__ == "__main__":
    main()
