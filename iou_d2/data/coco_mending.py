"""Mend the images and categories of a parsed COCO dict: what has one meaning gets COCO's form.

Nothing given is changed; records that are right are shared, not copied. What has no single meaning
raises an InputError that names the file and the record, as `images[7] (id 42)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from iou_d2.errors import InputError

from .cleaning import Findings
from .coco_values import as_id, as_size, is_text, short, where

IDS = "ids that were strings or decimals were read as integers"
NUMBERS = "numbers that were strings were read"
NAMES = "category names that were numbers were read as text"
GROUP = "categories that only group others, without annotations, were dropped"


def mend_ids(file: Path, kind: str, records: Sequence[Any], findings: Findings) -> list[dict]:
    """Records with integer ids, each of which stands once."""
    seen: dict[int, int] = {}
    mended = []
    for index, record in enumerate(records):
        number = as_id(record.get("id")) if isinstance(record, dict) else None
        if number is None:
            raise InputError(f"{file}: {kind}[{index}] has no integer id.")
        if number in seen:
            raise InputError(
                f"{file}: {kind}[{seen[number]}] and {kind}[{index}] have the same id {number}."
            )
        seen[number] = index
        if type(record["id"]) is not int:
            findings.add(IDS, where(kind, index, record))
            record = {**record, "id": number}
        mended.append(record)
    return mended


def mend_images(file: Path, images: Sequence[Any], findings: Findings) -> list[dict]:
    """Images with ids, file names and whole sizes; a size that is not given is 0."""
    mended = []
    for index, image in enumerate(mend_ids(file, "images", images, findings)):
        place = where("images", index, image)
        name = image.get("file_name")
        if not is_text(name) or not name:
            raise InputError(f"{file}: {place} has no file_name: {short(name)}.")
        for key in ("width", "height"):
            value = image.get(key)
            side = as_size(value)
            if side is None:
                raise InputError(
                    f"{file}: {place} needs a {key} in whole pixels, not {short(value)}."
                )
            if type(value) is not int:
                if side:
                    findings.add(NUMBERS, place)
                image = {**image, key: side}
        mended.append(image)
    return mended


def mend_categories(
    file: Path, categories: Sequence[Any], annotations: Iterable[Any], findings: Findings
) -> list[dict]:
    """Categories with ids and different names, without unused groups (as Roboflow writes one).

    A group is named as supercategory by another category, belongs to none itself and has no
    annotation. What was dropped stands in `findings.groups`, for other files may use it.
    """
    mended = []
    for index, category in enumerate(mend_ids(file, "categories", categories, findings)):
        name = category.get("name")
        if type(name) is int and as_id(name) is not None:
            findings.add(NAMES, where("categories", index, category))
            category = {**category, "name": str(name)}
        elif not is_text(name) or not name:
            place = where("categories", index, category)
            raise InputError(f"{file}: {place} has no name: {short(name)}.")
        mended.append(category)
    kept, used = list(enumerate(mended)), set()
    if _unused_groups(kept, used):  # seldom, so that millions need not be looked at for nothing
        used = {as_id(a.get("category_id")) for a in annotations if isinstance(a, dict)}
    # Groups may hold groups. Until none is left, so that a mended copy stays as it is.
    while groups := _unused_groups(kept, used):
        for index, category in groups:
            place = where("categories", index, category)
            findings.add(GROUP, f"{place} {category['name']!r}")
            findings.groups.append(category["name"])
        kept = [pair for pair in kept if pair not in groups]
    _require_different_names(file, kept)
    return [category for _, category in kept]


def _unused_groups(
    categories: Sequence[tuple[int, dict]], used: Container[int | None]
) -> list[tuple[int, dict]]:
    names = {category["name"] for _, category in categories}
    children = Counter(_parent(category) for _, category in categories)
    groups = []
    for index, category in categories:
        is_root = _parent(category) not in names
        if is_root and children[category["name"]] and category["id"] not in used:
            groups.append((index, category))
    return groups


def _parent(category: dict) -> str | None:
    parent = category.get("supercategory")
    return str(parent) if isinstance(parent, str) or type(parent) is int else None


def _require_different_names(file: Path, categories: Sequence[tuple[int, dict]]) -> None:
    seen: dict[str, str] = {}
    for index, category in categories:
        place, name = where("categories", index, category), category["name"]
        if name in seen:
            raise InputError(f"{file}: {seen[name]} and {place} have the same name '{name}'.")
        seen[name] = place
