"""Of which kind the masks of a dataset are."""

from __future__ import annotations

from .coco_records import LazyRecords, mask_kind, records_of


def first_by_mask(name: str) -> dict[str, str]:
    """The kinds of masks that the objects of a registered dataset have, crowds left out, each with
    the first object of it in words."""
    records = records_of(name)
    if isinstance(records, LazyRecords):
        return records.first_by_mask
    first: dict[str, str] = {}
    for record in records:
        for number, item in enumerate(record.get("annotations", ()), start=1):
            if not item.get("iscrowd", 0):
                where = f"object {number} of the image {record['file_name']}"
                first.setdefault(mask_kind(item), where)
    return first
