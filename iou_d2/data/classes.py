"""Classes of several datasets, and those that a model knows, brought together by their names.

A dataset counts its classes from 0 in an order of its own. Its reader looks up the index of each
class in its metadata, so that another order, set here, holds for all that is loaded later.
"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.data import MetadataCatalog

from iou_d2.errors import InputError

from .coco_records import records_of

# The readers of iou_d2, which follow the metadata. Detectron2's own have their order in code.
OWN = ("coco:", "voc:", "yolo:")


def classes_of(name: str) -> list[str]:
    """The class names of a registered dataset, in order of the class index.

    Raises InputError where it has none.
    """
    classes = MetadataCatalog.get(name).get("thing_classes")
    if not classes:
        raise InputError(f"The dataset '{name}' has no object classes to detect.")
    return list(classes)


def training_classes(
    names: Sequence[str], join: bool = False, tests: Sequence[str] = ()
) -> list[str]:
    """The class names of several training sets, in the order of the first.

    A group that was dropped from some as unused is a class where another set, of `tests` too, has
    it as one.

    Args:
        names: registered datasets. join: whether sets may have unlike classes, which then are
            taken together. What one set does not name is background there.
        tests: the test sets of the run.

    Raises InputError for no dataset, and where two have other classes.
    """
    if not names:
        raise InputError("DATASETS.TRAIN is empty: name the data to train on with --train.")
    sets = list(dict.fromkeys([*names, *tests]))
    dropped = [getattr(MetadataCatalog.get(name).get("findings"), "groups", []) for name in sets]
    classes_by_name = dict(zip(sets, with_used_groups(list(map(classes_of, sets)), dropped)))
    joined = classes_by_name[names[0]]
    for name in names[1:]:
        classes = classes_by_name[name]
        if sorted(classes) != sorted(joined) and not join:
            raise InputError(
                f"The classes of '{names[0]}' and '{name}' differ: {difference(joined, classes)}. "
                "Where objects of the missing classes are not in these images, set "
                "DATASETS.TRUST_CLASSES True to take all classes together."
            )
        joined += [c for c in classes if c not in joined]
    return joined


def with_used_groups(
    classes: Sequence[Sequence[str]], groups: Sequence[Sequence[str]]
) -> list[list[str]]:
    """The class names of several sets, each with those of its dropped `groups` that are classes of
    another set."""
    named = {name for own in classes for name in own}
    return [
        [*own, *(name for name in dropped if name in named and name not in own)]
        for own, dropped in zip(classes, groups)
    ]


def match_classes(
    name: str, classes: Sequence[str], known_by: str, leave_out: bool = False
) -> None:
    """Give a registered dataset the class indices of `classes`, by name.

    Classes that it lacks are no objects in it. Its metadata has all of `classes` as
    `thing_classes`, so that they name what a detector says.

    Args:
        name: a registered dataset. classes: those of the model, in the order of its outputs.
        known_by: what has `classes`, for the error, such as the file of the weights.
        leave_out: whether objects of other classes are left out.

    Raises InputError with both lists where the dataset has others, or none of them.
    """
    own = classes_of(name)
    if own == list(classes):
        return
    unknown = [c for c in own if c not in classes]
    if len(unknown) == len(own) or (unknown and not leave_out):
        insist = (
            ""
            if len(unknown) == len(own)
            else (" With DATASETS.TRUST_CLASSES True, objects of other classes are left out.")
        )
        raise InputError(
            f"{known_by} has the classes {', '.join(classes)}, but '{name}' has "
            f"{', '.join(own)}.{insist}"
        )
    if not name.startswith(OWN):
        raise InputError(
            f"{known_by} has the classes {', '.join(classes)}, but '{name}', whose order cannot "
            f"be changed, has {', '.join(own)}: name it by its file, as in coco:ANNOTATIONS.json."
        )
    _set_classes(name, own, list(classes))


def require_objects(names: Sequence[str]) -> None:
    """Raise an InputError unless the datasets `names` hold an object to learn from.

    Crowds are none, and what the readers dropped is not there.
    """
    images = 0
    for name in names:
        for record in records_of(name):
            images += 1
            if any(not a.get("iscrowd", 0) for a in record.get("annotations", ())):
                return
    raise InputError(
        f"There is not one object to learn in the {images} images of {', '.join(names)}: all are "
        "crowds, were dropped because they have no area or lie outside, or there are none."
    )


def difference(first: Sequence[str], second: Sequence[str]) -> str:
    """How two lists with unlike names differ."""
    parts = [
        ("only in the first", [c for c in first if c not in second]),
        ("only in the second", [c for c in second if c not in first]),
    ]
    return "; ".join(f"{what}: {', '.join(found)}" for what, found in parts if found)


def _set_classes(name: str, own: list[str], classes: list[str]) -> None:
    metadata = MetadataCatalog.get(name)
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    # Metadata refuses another value for what it has.
    del metadata.thing_classes
    metadata.thing_classes = classes
    if ids is None:
        return
    del metadata.thing_dataset_id_to_contiguous_id
    metadata.thing_dataset_id_to_contiguous_id = {
        id_: classes.index(own[index]) for id_, index in ids.items() if own[index] in classes
    }
