"""The class outputs of a model, matched by name with those of a checkpoint of other classes.

A row is a slice of a tensor along its first axis. TABLE says which tensors of which modules have
rows of classes, and in which order; shapes alone do not tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import Tensor, nn

from iou_d2.detectors.iou_branch import IoUBranch
from iou_d2.detectors.multibox import LevelConvs
from iou_d2.detectors.point_heads import TwoTowerHead
from iou_d2.detectors.refinedet import RefineDetHead
from iou_d2.detectors.ssd import SSDHead
from iou_d2.detectors.unitbox import UnitBoxHead
from iou_d2.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassRows:
    """The order of the rows of a tensor: groups x (classes x per_class, then background).

    Args:
        groups: such as the anchors of a cell, each of which has rows of all classes.
        per_class: consecutive rows of one class, such as the four of its box.
        background: rows behind those of all classes, which are kept whatever the classes are.
    """

    groups: int = 1
    per_class: int = 1
    background: int = 0

    def count(self, classes: int) -> int:
        """Rows of a tensor of so many classes."""
        return self.groups * (classes * self.per_class + self.background)

    def moved(self, old: Tensor, fresh: Tensor, places: Mapping[int, int]) -> Tensor:
        """`fresh` with rows of `old`, as a new tensor.

        Args:
            old, fresh: of K_old and K classes, with the same size but for the first axis.
            places: index of a class in `fresh` -> its index in `old`.
        """
        result = fresh.clone()
        source, target = self._by_group(old), self._by_group(result)
        if self.background:
            target[:, -self.background :] = source[:, -self.background :].to(target)
        source, target = self._by_class(source), self._by_class(target)
        for new_index, old_index in places.items():
            target[:, new_index] = source[:, old_index].to(target)
        return result

    def _by_group(self, tensor: Tensor) -> Tensor:
        """A view (groups, rows of a group, ...) of all rows."""
        return tensor.view(self.groups, -1, *tensor.shape[1:])

    def _by_class(self, groups: Tensor) -> Tensor:
        """A view (groups, K, per_class, ...) of the rows of classes."""
        rows = groups[:, : groups.shape[1] - self.background]
        return rows.unflatten(1, (-1, self.per_class))


def _of_retinanet(head: RetinaNetHead, cfg: CfgNode) -> dict[str, ClassRows]:
    anchors = head.cls_score.out_channels // cfg.MODEL.RETINANET.NUM_CLASSES
    return {"cls_score": ClassRows(groups=anchors)}


def _of_points(head: TwoTowerHead, cfg: CfgNode) -> dict[str, ClassRows]:
    return {"cls_pred": ClassRows()}


def _of_unitbox(head: UnitBoxHead, cfg: CfgNode) -> dict[str, ClassRows]:
    return {"confidence": ClassRows()}


def _of_ssd(head: SSDHead, cfg: CfgNode) -> dict[str, ClassRows]:
    return _of_levels("cls_score", head.cls_score, cfg)


def _of_refinedet(head: RefineDetHead, cfg: CfgNode) -> dict[str, ClassRows]:
    return _of_levels("odm_score", head.odm_score, cfg)


def _of_levels(name: str, convs: LevelConvs, cfg: CfgNode) -> dict[str, ClassRows]:
    scores = cfg.MODEL.RETINANET.NUM_CLASSES + 1
    return {
        f"{name}.{level}": ClassRows(groups=conv.out_channels // scores, background=1)
        for level, conv in enumerate(convs)
    }


def _of_box_predictor(layers: FastRCNNOutputLayers, cfg: CfgNode) -> dict[str, ClassRows]:
    rows = {"cls_score": ClassRows(background=1)}
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        rows["bbox_pred"] = ClassRows(per_class=len(layers.box2box_transform.weights))
    return rows


def _of_masks(head: MaskRCNNConvUpsampleHead, cfg: CfgNode) -> dict[str, ClassRows]:
    return {} if cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK else {"predictor": ClassRows()}


def _of_iou_branch(branch: IoUBranch, cfg: CfgNode) -> dict[str, ClassRows]:
    return {} if cfg.MODEL.IOU_NET.CLASS_AGNOSTIC else {"iou_pred": ClassRows()}


# Module -> names of its layers whose weight and bias have rows of classes.
TABLE: dict[type[nn.Module], Callable[[nn.Module, CfgNode], dict[str, ClassRows]]] = {
    RetinaNetHead: _of_retinanet,
    TwoTowerHead: _of_points,
    UnitBoxHead: _of_unitbox,
    SSDHead: _of_ssd,
    RefineDetHead: _of_refinedet,
    FastRCNNOutputLayers: _of_box_predictor,
    MaskRCNNConvUpsampleHead: _of_masks,
    IoUBranch: _of_iou_branch,
}


class ModelClasses(NamedTuple):
    """The classes of a model, in the order of its outputs, and its tensors that have their rows."""

    names: list[str]
    rows: dict[str, ClassRows]


def classes_of_model(model: nn.Module, cfg: CfgNode) -> ModelClasses:
    """MODEL.CLASS_NAMES of `cfg`, and the names of the tensors of its `model` by TABLE."""
    rows = {}
    for prefix, module in model.named_modules():
        for kind, layers_of in TABLE.items():
            if not isinstance(module, kind):
                continue
            for layer, order in layers_of(module, cfg).items():
                for name, _ in module.get_submodule(layer).named_parameters(recurse=False):
                    rows[".".join(filter(None, (prefix, layer, name)))] = order
    return ModelClasses(list(cfg.MODEL.CLASS_NAMES), rows)


def match_rows(
    weights: dict[str, Tensor],
    known: Sequence[str],
    fresh: Mapping[str, Tensor],
    classes: ModelClasses,
    file: str,
    by_suffix: bool = False,
) -> None:
    """Fit `weights`, of a file that knows the classes `known`, to a model of other classes.

    Rows of classes with the same name go to their new places, the others are those of `fresh`, and
    the log says which. Of the dict `weights` tensors are replaced, and none is changed. One whose
    number of rows is not that of `known` is removed where it would fit the model, so that no row
    gets the wrong class.

    Args:
        fresh: the state of the model as it was made.
        by_suffix: whether names in the file may lack the beginning of those of the model.

    Raises:
        InputError: a name in `known` is there twice, or as many classes have other names and TABLE
            has no tensor of this model.
    """
    known = list(known)
    if not known or not classes.names or known == classes.names:
        return
    _check(known, classes, file)
    places = {i: known.index(name) for i, name in enumerate(classes.names) if name in known}
    moved, used = {}, set()
    for name, order in classes.rows.items():
        key = _key_of(name, weights, by_suffix)
        if key is None:
            continue
        old, new = weights[key], fresh[name]
        counts = (order.count(len(known)), order.count(len(classes.names)))
        if (len(old), len(new)) == counts and old.shape[1:] == new.shape[1:]:
            moved[name] = order.moved(old, new, places)
            used.add(key)
        elif old.shape == new.shape:
            used.add(key)
            logger.warning(
                f"{key} in {file} has {len(old)} rows, which are not those of its {len(known)} "
                "classes: it starts anew."
            )
    for key in used:
        del weights[key]
    weights.update(moved)
    kept = [classes.names[i] for i in places]
    anew = [name for name in classes.names if name not in known]
    logger.info(
        f"{file} has other classes. By their names the rows of {', '.join(kept) or 'none'} are "
        f"kept in {len(moved)} tensors; {', '.join(anew) or 'none'} start anew."
    )


def _check(known: list[str], classes: ModelClasses, file: str) -> None:
    if len(set(known)) < len(known):
        raise InputError(f"{file} has one of the class_names {', '.join(known)} twice.")
    if not classes.rows and len(known) == len(classes.names):
        raise InputError(
            f"{file} knows the classes {', '.join(known)} and this model learns "
            f"{', '.join(classes.names)}, but which of its tensors have rows of classes is not "
            "known: start from weights of the same classes, or of none."
        )


def _key_of(name: str, weights: Mapping[str, Tensor], by_suffix: bool) -> str | None:
    """The name of a tensor of the model in a file: the longest one that fits, as Detectron2 has
    it."""
    if name in weights:
        return name
    if not by_suffix:
        return None
    parts = name.split(".")
    suffixes = (".".join(parts[start:]) for start in range(1, len(parts)))
    return next((suffix for suffix in suffixes if suffix in weights), None)
