"""Files of proposals, which MODEL.LOAD_PROPOSALS reads: docs/FOUR_STEP_RPN.md."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode

from iou_d2.data.coco_records import records_of
from iou_d2.errors import InputError

from .safe_load import read_checkpoint_file

# What Detectron2 calls the lists of a file, and what Detectron did.
_NAMES = {"ids": "indexes", "boxes": "boxes", "objectness_logits": "scores"}


def check_proposals(cfg: CfgNode, splits: Sequence[str]) -> None:
    """Check the files that the datasets of "TRAIN" or "TEST" get with MODEL.LOAD_PROPOSALS True.

    They are read as weights are, so that Detectron2, which unpickles them, runs nothing in them.

    Raises:
        InputError: not one file a dataset, one that holds something else, or no proposals for an
            image.
        MissingFileError: there is no such file.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for split in splits:
        key, names = f"DATASETS.PROPOSAL_FILES_{split}", cfg.DATASETS[split]
        files = cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
        if isinstance(files, str) or len(files) != len(names):
            raise InputError(
                f"{key} is {files!r}, but MODEL.LOAD_PROPOSALS takes a tuple of one file for each "
                f"of DATASETS.{split}, {', '.join(names)}."
            )
        for name, file in zip(names, files):
            _check_file(file, name)


def _check_file(file: str, dataset: str) -> None:
    content = read_checkpoint_file(file)
    lists = [content.get(name, content.get(old)) for name, old in _NAMES.items()]
    if any(not isinstance(x, list) for x in lists) or len(set(map(len, lists))) != 1:
        raise InputError(
            f"{file} is no file of proposals: it has no lists {', '.join(_NAMES)} of one length."
        )
    known = set(map(str, lists[0]))
    missing = [x["image_id"] for x in records_of(dataset) if str(x["image_id"]) not in known]
    if missing:
        raise InputError(
            f"{file} has no proposals for {len(missing)} images of {dataset}, such as that of "
            f"image_id {missing[0]}: write them for this dataset."
        )
