"""Checkpoints that are written whole, and that are read without running what is in them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from fvcore.common.checkpoint import _filter_reused_missing_keys, _strip_prefix_if_present
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from iou_d2.data.augmentation import build_augmentations
from iou_d2.detectors.test_time_augmentation import with_tta
from iou_d2.errors import InputError, MissingFileError
from iou_d2.resize import for_any_shape

from .build import as_configured
from .class_rows import ModelClasses, match_rows
from .pretrained import is_pretrained, load_pretrained, require_trained
from .safe_load import local_file, read_checkpoint_file
from .whole_file import replace_file


@dataclass(frozen=True)
class Mismatch:
    """How the tensors of a file differ from those of the model that took them."""

    file: str
    loaded: int  # parameters and buffers of the model that were in the file
    missing: tuple[str, ...]  # in the model alone
    unexpected: tuple[str, ...]  # in the file alone
    other_shapes: tuple[tuple[str, tuple, tuple], ...]  # (name, shape in file, shape in model)

    @property
    def is_whole(self) -> bool:
        """Whether the model took all of its weights from the file."""
        return self.loaded > 0 and not self.missing and not self.other_shapes

    def sentence(self) -> str:
        parts = [f"{self.loaded} of the model's tensors are in {self.file}"]
        if self.missing:
            parts.append(f"{len(self.missing)} are not, such as {self.missing[0]}")
        if self.other_shapes:
            name, found, wanted = self.other_shapes[0]
            parts.append(
                f"{len(self.other_shapes)} have another shape, such as {name} with {found} in the "
                f"file and {wanted} in the model"
            )
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} are unknown, such as {self.unexpected[0]}")
        return "; ".join(parts) + "."


def split_weights(weights: str) -> tuple[str, bool]:
    """MODEL.WEIGHTS as a path or address, and whether its "?matching_heuristics=True" lets
    Detectron2 match its tensors with those of the model by the ends of their names."""
    url = urlparse(weights or "")
    if url.query != "matching_heuristics=True" or os.path.isfile(weights):
        return weights, False
    return url._replace(query="").geturl(), True


class SafeCheckpointer(DetectionCheckpointer):
    """A DetectionCheckpointer that runs nothing that is in a file, and of which a crash never
    leaves half a file behind.

    Each file is written beside its place and renamed when it is on the disk.

    Attributes:
        mismatch: the Mismatch of the last `load`; None before, and where nothing was loaded.
        filled: names of the tensors of the model that the last `load` filled.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        extra: dict | None = None,
        content: dict | None = None,
        trust: bool = False,
        classes: ModelClasses | None = None,
        saved: nn.Module | None = None,
        **checkpointables,
    ):
        """
        Args:
            extra: stored in every checkpoint as it is.
            content: what `read_checkpoint_file` read of the file that is going to be loaded, which
                is not read again.
            trust: let files make any object and so run any code.
            classes: those of `model`, to which a file of other classes is matched by name.
            saved: whose weights are written in place of those of `model`, such as their average.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.extra = extra or {}
        self.content = content
        self.trust = trust
        self.classes = classes
        self.saved = saved
        self.mismatch: Mismatch | None = None
        self.filled: set[str] = set()

    def load(self, path: str, *args, **kwargs) -> dict:
        """As that of DetectionCheckpointer; `path` may also name a backbone of torchvision.

        Raises:
            MissingFileError, InputError: sentences that name the file, and the tensor that is none.
        """
        self.mismatch, self.filled = None, set()
        if path and is_pretrained(path):
            self.filled = load_pretrained(self.model, path)
            return {}
        path, self._is_matched = split_weights(path)
        # Of several processes, Detectron2 lets those read nothing that do not see the file.
        is_alone = not isinstance(self.model, DistributedDataParallel)
        if path and self.content is None and is_alone:
            path = local_file(path)
        try:
            return super().load(path, *args, **kwargs)
        except OSError as error:
            if "not found on main worker" not in str(error):
                raise
            raise MissingFileError(f"There is no file {path}.") from error
        finally:
            self._parsed_url_during_load = None  # Detectron2 main, which keeps it after an error

    def _load_file(self, filename: str) -> dict:
        content = self.content
        if content is None:
            content = read_checkpoint_file(filename, self.trust)
        content = _as_detectron2_takes_it(filename, dict(content))
        if self._is_matched:
            content["matching_heuristics"] = True
        content["model"] = _checked_weights(filename, content["model"])
        self._file = filename
        return content

    def _load_model(self, checkpoint: dict):
        try:
            if self.classes:
                self._match_classes(checkpoint, self.classes)
            found = super()._load_model(checkpoint)
        except InputError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self._file} does not fit the model: {reason}") from error
        shapes = tuple(found.incorrect_shapes)
        # The number of batches tells nothing of what the model finds; converted files have none.
        wanted = {k for k in self.model.state_dict() if not k.endswith("num_batches_tracked")}
        absent = wanted.intersection(found.missing_keys)
        skipped = {name for name, _, _ in shapes}
        self.filled = wanted - absent - skipped
        self.mismatch = Mismatch(
            self._file,
            loaded=len(self.filled),
            # A tensor that has two names in the model is there under either of them.
            missing=tuple(sorted(set(_filter_reused_missing_keys(self.model, absent)) - skipped)),
            unexpected=tuple(k for k in found.unexpected_keys if "cell_anchors" not in k),
            other_shapes=shapes,
        )
        self._warn_of_non_finite()
        return found

    def _match_classes(self, checkpoint: dict, classes: ModelClasses) -> None:
        """Give the rows of classes in `checkpoint` the order of the model, in place."""
        known = checkpoint.get("class_names") or []
        if not isinstance(known, (list, tuple)) or not all(isinstance(x, str) for x in known):
            raise InputError(f"class_names in {self._file} are no list of names.")
        weights = checkpoint["model"]
        self._convert_ndarray_to_tensor(weights)
        _strip_prefix_if_present(weights, "module.")
        by_suffix = checkpoint.get("matching_heuristics", False)
        state = self.model.state_dict()
        match_rows(weights, known, state, classes, self._file, by_suffix)

    def _warn_of_non_finite(self) -> None:
        """Say which tensors of the model are NaN or infinite after loading."""
        bad = [
            name
            for name, value in self.model.state_dict().items()
            if value.is_floating_point() and not value.isfinite().all()
        ]
        if bad:
            self.logger.warning(
                f"After loading {self._file}, {len(bad)} tensors are not finite, such as {bad[0]}."
            )

    def save(self, name: str, **kwargs) -> None:
        """Write a checkpoint, and make it the last one. Raises what `write` does."""
        if not self.save_dir or not self.save_to_disk:
            return
        self.write(name, **kwargs)
        self.tag_last_checkpoint(f"{name}.pth")

    def write(self, name: str, **kwargs) -> None:
        """Write a checkpoint that --resume does not go on from; with `kwargs` in it.

        Raises OSError with the file's name where the disk refuses it; no part of it is left.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        saved = self.model if self.saved is None else self.saved
        data = {"model": saved.state_dict(), **self.extra}
        for key, part in self.checkpointables.items():
            data[key] = part.state_dict()
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        replace_file(path, lambda file: torch.save(data, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        replace_file(path, lambda file: file.write(last_filename_basename.encode()))


def build_predictor(cfg: CfgNode, trust: bool = False) -> DefaultPredictor:
    """Detectron2's DefaultPredictor with MODEL.WEIGHTS read by SafeCheckpointer, and with the
    resize of INPUT.AUGMENTATIONS where that names one, or the views of TEST.AUG where that is
    enabled.

    Raises what SafeCheckpointer.load and `with_tta` do.
    """
    require_trained(cfg.MODEL.WEIGHTS)
    predictor = untrained_predictor(cfg)
    SafeCheckpointer(predictor.model, trust=trust).load(cfg.MODEL.WEIGHTS)
    predictor.cfg = cfg.clone()
    use_tta(predictor, cfg)
    return predictor


def use_tta(predictor: DefaultPredictor, cfg: CfgNode) -> None:
    """Have `predictor`, whose model has its weights, look at the views of TEST.AUG, if enabled."""
    if cfg.TEST.AUG.ENABLED:
        predictor.aug = T.ResizeShortestEdge(0)  # none: views are made of the image as it is
        predictor.model = with_tta(cfg, predictor.model)


def untrained_predictor(cfg: CfgNode) -> DefaultPredictor:
    """`build_predictor` before there are weights."""
    untrained = cfg.clone()
    untrained.defrost()
    untrained.MODEL.WEIGHTS = ""
    predictor = DefaultPredictor(untrained)
    as_configured(predictor.model, cfg)
    predictor.aug = for_any_shape(predictor.aug)
    if cfg.INPUT.get("AUGMENTATIONS"):
        (predictor.aug,) = build_augmentations(cfg, is_train=False)
    return predictor


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove what killed runs left half written in `folder`, where no other run may be writing."""
    for path in Path(folder).glob("*.unfinished"):
        path.unlink(missing_ok=True)


def _as_detectron2_takes_it(filename: str, content: dict) -> dict:
    """`content` with its weights under "model": the ending of `filename` says whose names it has.

    A .pkl without "__author__" has the names of Caffe2, which are matched with those of the model.
    """
    if filename.endswith(".pkl"):
        if "model" in content and "__author__" in content:
            return content
        blobs = content.get("blobs", content)
        if not isinstance(blobs, dict):
            raise InputError(f"blobs in {filename} are no dict of arrays.")
        weights = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    if filename.endswith(".pyth") and isinstance(content.get("model_state"), dict):
        weights = {
            k: v
            for k, v in content["model_state"].items()
            if not str(k).endswith("num_batches_tracked")
        }
        return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
    return content if "model" in content else {"model": content}


def _checked_weights(filename: str, weights: object) -> dict:
    if not isinstance(weights, dict):
        kind = type(weights).__name__
        raise InputError(f"model in {filename} is a {kind} and not a dict of tensors.")
    for name, value in weights.items():
        if not isinstance(name, str):
            raise InputError(f"{filename} has the key {name!r}, which is no name of a tensor.")
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            kind = type(value).__name__
            raise InputError(f"{name} in {filename} is a {kind} and not a tensor.")
        if np.iscomplexobj(value) if isinstance(value, np.ndarray) else value.is_complex():
            raise InputError(f"{name} in {filename} is complex, which no weight is.")
    return weights.copy()
