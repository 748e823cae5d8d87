"""Training data whose order a resumed run goes on with."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence

from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import print_instances_class_histogram
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from iou_d2.data.coco_records import LazyRecords, records_of
from iou_d2.data.mapper import CheckedDatasetMapper


class ResumableSampler(TrainingSampler):
    """Detectron2's TrainingSampler, which can begin later in its endless order of shuffled passes.

    Attributes:
        start: images of all processes together that are left out at the beginning.
    """

    def __init__(self, size: int, digest: str):
        """`digest`: what tells the images from others, see `digest_of`."""
        super().__init__(size, seed=comm.shared_random_seed())
        self.start = 0
        self._digest = digest

    def __iter__(self) -> Iterator[int]:
        first = self.start + self._rank
        yield from itertools.islice(self._infinite_indices(), first, None, self._world_size)

    def state_dict(self, images: int) -> dict:
        """What it takes to go on after `images` more than the first `start` ones."""
        images += self.start
        return {"seed": self._seed, "images": images, "size": self._size, "digest": self._digest}

    def load_state_dict(self, state: dict | None) -> None:
        """Go on where `state` says; with a warning from the beginning, where that cannot be."""
        logger = logging.getLogger(__name__)
        if state is None:
            logger.warning("The checkpoint does not say where its data were: a new pass begins.")
            return
        if state["size"] != self._size:
            logger.warning(
                f"The checkpoint had {state['size']} training images and there are {self._size}: "
                "a new pass begins."
            )
            return
        # Older checkpoints have the number alone.
        if state.get("digest", self._digest) != self._digest:
            logger.warning(
                "The checkpoint had other training images, or these elsewhere or in another order: "
                "a new pass begins."
            )
            return
        self._seed, self.start = state["seed"], state["images"]


def digest_of(names: Sequence[str], dataset: Sequence[dict]) -> str:
    """SHA-256 of the names of the training sets and of the files of their images, in order."""
    digest = hashlib.sha256()
    is_lazy = isinstance(dataset, LazyRecords)
    files = dataset.file_names() if is_lazy else (record["file_name"] for record in dataset)
    for name in itertools.chain(names, files):
        digest.update(os.fsencode(name) + b"\0")  # which no name holds
    return digest.hexdigest()


class TrainData:
    """A training loader that is built when its first batch is asked for, so that a checkpoint can
    say before where it begins.

    A resumed run sees the images that the first one would have seen next, but for those that its
    data loader held back to group them by aspect ratio, and with other random augmentation. With
    another sampler than Detectron2's default a new pass begins.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg
        self._dataset = self._read()
        is_default = cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler"
        self.sampler = None
        if is_default:
            digest = digest_of(cfg.DATASETS.TRAIN, self._dataset)
            self.sampler = ResumableSampler(len(self._dataset), digest)

    def __iter__(self) -> Iterator[list[dict]]:
        yield from self._loader()

    def _loader(self) -> Iterable[list[dict]]:
        # The loader keeps a packed copy, so that this one would fill memory for nothing.
        dataset, self._dataset = self._dataset or self._read(), None
        mapper = CheckedDatasetMapper(self.cfg, is_train=True)
        return build_detection_train_loader(
            self.cfg, mapper=mapper, dataset=dataset, sampler=self.sampler
        )

    def _read(self) -> Sequence[dict]:
        cfg = self.cfg
        needs_all = cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS
        if len(cfg.DATASETS.TRAIN) == 1 and not needs_all:
            records = records_of(cfg.DATASETS.TRAIN[0])
            if isinstance(records, LazyRecords):
                return self._choose(records)
        return get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
            if cfg.MODEL.KEYPOINT_ON
            else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )

    def _choose(self, records: LazyRecords) -> LazyRecords:
        """What Detectron2's get_detection_dataset_dicts does, without all records in memory."""
        if self.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            chosen = records.with_objects()
            logging.getLogger(__name__).info(
                f"Removed {len(records) - len(chosen)} images with no usable annotations. "
                f"{len(chosen)} images left."
            )
            records = chosen
        names = MetadataCatalog.get(self.cfg.DATASETS.TRAIN[0]).thing_classes
        # Detectron2 counts image by image. One that holds all objects is counted a hundred times
        # faster; its list holds the same few dicts again and again.
        counts = records.objects_by_class()
        objects = [o for c, n in counts.items() for o in [{"category_id": c}] * n]
        print_instances_class_histogram([{"annotations": objects}], names)
        return records

    def state_dict(self, iterations: int) -> dict | None:
        """What it takes to go on after so many batches of this run."""
        if self.sampler is None:
            return None
        return self.sampler.state_dict(iterations * self.cfg.SOLVER.IMS_PER_BATCH)

    def load_state_dict(self, state: dict | None) -> None:
        if self.sampler is None:
            logging.getLogger(__name__).warning(
                f"DATALOADER.SAMPLER_TRAIN {self.cfg.DATALOADER.SAMPLER_TRAIN} does not remember "
                "where it was: a new pass begins."
            )
            return
        self.sampler.load_state_dict(state)
