"""What a report counts, as a dataset for the app of FiftyOne (voxel51), where that is installed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from iou_d2.errors import InputError

from .measures import Measures
from .subject import Subject

GROUND_TRUTH = "ground_truth"


def check_dataset(name: str) -> None:
    """Raises InputError: FiftyOne is not installed, has no database, or has a dataset `name`."""
    try:
        import fiftyone
    except ImportError as error:
        sentence = "--fiftyone needs the package fiftyone: `pip install fiftyone`."
        raise InputError(sentence) from error
    try:
        names = fiftyone.list_datasets()
    except Exception as error:  # its own and those of its database
        raise InputError(f"FiftyOne does not reach its database: {error}") from error
    if name in names:
        raise InputError(f"FiftyOne has a dataset {name} already: --fiftyone takes another name.")


def write_dataset(
    subjects: Sequence[Subject], measures: Sequence[Measures | None], name: str
) -> None:
    """Make the persistent dataset `name`: a sample for each image of the one test set, with its
    objects in the field "ground_truth" and the detections of each subject in a field of its own.

    An object has `iscrowd` and `not_found_by`, names of subjects; a detection has its confidence,
    its class score and predicted IoU where there are any, its true `iou`, and TIDE's type of
    `error`, "found" or "ignored". A dataset that cannot be finished is removed.

    Args:
        measures: of `measure`, one for each subject.

    Raises InputError: see `check_dataset`; or a subject without ground truth, results or images, of
    another test set than the first; or an image of no known size.
    """
    check_dataset(name)
    import fiftyone

    _check_subjects(subjects, measures)
    samples = _samples(fiftyone, subjects, measures)
    dataset = fiftyone.Dataset(name, persistent=True)
    try:
        dataset.add_samples(samples)
    except BaseException:
        dataset.delete()
        raise


def field_names(names: Sequence[str]) -> list[str]:
    """Names of fields, which are letters, digits and underlines, each another."""
    fields: list[str] = []
    for name in names:
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        field = plain if re.match("[A-Za-z]", plain) else f"of_{plain.lstrip('_')}"
        while field in (*fields, GROUND_TRUTH, "id", "filepath", "tags", "metadata"):
            field += "_"
        fields.append(field)
    return fields


def _check_subjects(subjects: Sequence[Subject], measures: Sequence[Measures | None]) -> None:
    for subject, measured in zip(subjects, measures):
        if measured is None or subject.images is None:
            raise InputError(
                "--fiftyone needs ground truth, results and images (--images), and "
                f"{subject.name} lacks one of them."
            )
        # Objects are told by their place, so that their order has to be the same, too.
        if measured.truth != measures[0].truth:
            raise InputError(
                f"--fiftyone shows one test set, but those of {subjects[0].name} and "
                f"{subject.name} differ."
            )


def _samples(fiftyone, subjects: Sequence[Subject], measures: Sequence[Measures]) -> list:
    truth, folder = measures[0].truth, subjects[0].images
    paths = {image["id"]: folder / str(image["file_name"]) for image in truth["images"]}
    sizes = {image["id"]: _size(image, paths[image["id"]]) for image in truth["images"]}
    classes = {category["id"]: str(category["name"]) for category in truth["categories"]}

    def label(record: dict, attributes: dict):
        x, y, width, height = record["bbox"]
        across, down = sizes[record["image_id"]]
        box = [x / across, y / down, width / across, height / down]
        return fiftyone.Detection(
            label=classes[record["category_id"]], bounding_box=box, **attributes
        )

    names = [subject.name for subject in subjects]
    fields = {GROUND_TRUTH: (truth["annotations"], _attributes_of_objects(names, measures))}
    for field, measured in zip(field_names(names), measures):
        fields[field] = (measured.results, _attributes_of_detections(measured))
    samples = {image: fiftyone.Sample(filepath=str(paths[image].resolve())) for image in paths}
    for field, (records, attributes) in fields.items():
        of_image = {image: [] for image in samples}
        for record, values in zip(records, attributes):
            of_image[record["image_id"]].append(label(record, values))
        for image, labels in of_image.items():
            samples[image][field] = fiftyone.Detections(detections=labels)
    return list(samples.values())


def _attributes_of_objects(names: Sequence[str], measures: Sequence[Measures]) -> list[dict]:
    return [
        {
            "iscrowd": bool(annotation.get("iscrowd", 0)),
            "not_found_by": [n for n, m in zip(names, measures) if m.errors.unfound[index]],
        }
        for index, annotation in enumerate(measures[0].truth["annotations"])
    ]


def _attributes_of_detections(measures: Measures) -> list[dict]:
    records = measures.records
    numbers = records.signals() | {"iou": records.true_iou}
    return [
        {name: float(values[row]) for name, values in numbers.items()} | {"error": str(kind)}
        for row, kind in enumerate(measures.errors.kind)
    ]


def _size(image: dict, path: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    if image.get("width") and image.get("height"):
        return image["width"], image["height"]
    try:
        with Image.open(path) as picture:
            return picture.size
    except OSError as error:
        raise InputError(f"Nothing says how large the image {path} is: {error}") from error
