"""Names, and the numbers behind them, from one layout into another."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor

from iou_d2.errors import InputError

from .atss import ATSS
from .fcos import FCOS, FCOS_DEFORMABLE
from .iou_net import IOU_NET
from .network import Network
from .rcnn import RCNN, RCNN_V2
from .refinedet import REFINEDET
from .resnet import (
    BOTTOM_UP,
    backbone_prefix,
    classifier_rows,
    mmdet_fpn_rows,
    resnet_rows,
    same_rows,
    torchvision_fpn_rows,
)
from .retinanet import RETINANET, RETINANET_WITH_NORM
from .rows import Change, Match, Rewrite, Row, find_rows, has_name
from .ssd import SSD
from .vfnet import VFNET

NETWORKS: tuple[Network, ...] = (
    VFNET,
    ATSS,
    FCOS_DEFORMABLE,
    FCOS,
    RETINANET_WITH_NORM,
    RETINANET,
    IOU_NET,
    RCNN_V2,
    RCNN,
    SSD,
    REFINEDET,
)
UNSUPPORTED = {
    r"layer\d\.\d+\.convs\.\d": "a Res2Net",
    r"backbone\.stem\.\d": "a ResNet with a deep stem (V1c, V1d)",
    r"neck\.(downsample_convs|pafpn_convs)": "the PAFPN of VFNet-X",
}


class Translated(NamedTuple):
    """Tensors by their new names, the old name -> the new one, and what changed beside names."""

    tensors: dict[str, Tensor]
    names: dict[str, str]
    told: list[str]


class _Step(NamedTuple):
    """From a source name over Detectron2's to a target name, and what changes on the way."""

    hub: str
    name: str
    to_ours: Change | None
    to_theirs: Change | None


def translate(names: Collection[str], source: str, target: str) -> dict[str, str]:
    """Names of layout `source` -> names of layout `target`, for those that both layouts have.

    A ResNet without a detector gets no prefix in Detectron2, as in its ImageNet models.

    Raises:
        InputError: the names are of a network that the target cannot build, or two of them stand
            for the same parameter.
    """
    return {name: step.name for name, step in _steps(names, source, target).items()}


def translate_tensors(tensors: Mapping[str, Tensor], source: str, target: str) -> Translated:
    """`tensors` of layout `source` in layout `target`: those that both have.

    Raises:
        InputError: as `translate`, or a tensor has not the shape that its name stands for.
    """
    steps = _steps(tensors, source, target)
    hub, told = {}, []
    for name, step in steps.items():
        hub[step.hub] = tensors[name]
        if step.to_ours:
            hub[step.hub] = _changed(step.to_ours.to_ours, name, tensors)
            told.append(step.to_ours.told)
    translated = {}
    for step in steps.values():
        translated[step.name] = hub[step.hub]
        if step.to_theirs:
            translated[step.name] = _changed(step.to_theirs.to_theirs, step.hub, hub)
            told.append(step.to_theirs.told)
    names = {name: step.name for name, step in steps.items()}
    return Translated(translated, names, list(dict.fromkeys(filter(None, told))))


def _changed(rewrite: Rewrite, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    try:
        return rewrite(tensors[name], tensors)
    except (IndexError, RuntimeError, TypeError) as error:  # what torch says of another shape
        raise InputError(
            f"{name} is of shape {tuple(tensors[name].shape)}, which does not fit its name: is the "
            "file of another network?"
        ) from error


def recognise(names: Collection[str], layout: str) -> Network | None:
    """The network that has these names in `layout`, if it is one of NETWORKS."""
    for network in NETWORKS:
        if layout in network.signs and has_name(network.signs[layout], names):
            return network
    return None


def _steps(names: Collection[str], source: str, target: str) -> dict[str, _Step]:
    _check_supported(names)
    network = recognise(names, source)
    hub = _to_ours(names, source, network)
    back = _to_theirs([match.name for match in hub.values()], target, source, network)
    steps, origin = {}, {}
    for name, match in hub.items():
        if match.name not in back:
            continue
        if origin.setdefault(match.name, name) != name:
            raise InputError(f"{origin[match.name]} and {name} stand for the same parameter.")
        there = back[match.name]
        steps[name] = _Step(match.name, there.name, match.change, there.change)
    return steps


def _to_ours(names: Collection[str], source: str, network: Network | None) -> dict[str, Match]:
    """Name of `source` -> name of Detectron2."""
    if source == "detectron2":
        prefix = backbone_prefix(names)
        return {name: Match(_with_prefix(name, prefix, BOTTOM_UP), None) for name in names}
    return find_rows(names, _rows(source, names, network, body="backbone.body."), to_ours=True)


def _to_theirs(
    names: Collection[str], target: str, source: str, network: Network | None
) -> dict[str, Match]:
    """Name of Detectron2 -> name of `target`."""
    if target == "detectron2":
        prefix = "" if source == "torchvision" and network is None else BOTTOM_UP
        return {name: Match(_with_prefix(name, BOTTOM_UP, prefix), None) for name in names}
    body = "backbone.body." if network and target in network.rows else ""
    return find_rows(names, _rows(target, names, network, body), to_ours=False)


def _with_prefix(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name.startswith(old) else name


def _rows(layout: str, names: Collection[str], network: Network | None, body: str) -> list[Row]:
    """The rows of `layout`, whose ResNet is called `body` in a detector of torchvision."""
    four_levels = has_name(r"lateral_convs\.3\.|fpn_lateral2\.|inner_blocks\.3\.", names)
    first_level = 2 if four_levels else 3
    head = network.rows[layout]() if network and layout in network.rows else []
    if layout == "mmdet":
        return resnet_rows("backbone.") + mmdet_fpn_rows(first_level) + head
    if layout == "torchvision":
        whole = resnet_rows(body) + torchvision_fpn_rows(first_level) + head if body else []
        return whole + resnet_rows("") + classifier_rows()
    return [*same_rows(first_level), *head]


def _check_supported(names: Collection[str]) -> None:
    for name in names:
        for pattern, network in UNSUPPORTED.items():
            if re.search(pattern, name):
                raise InputError(f"{name} is of {network}, which cannot be converted.")
