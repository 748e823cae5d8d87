"""Convert a checkpoint between mmdetection, torchvision and Detectron2.

    iou-d2 convert vfnet_r50_fpn_1x_coco.pth vfnet_R_50.pth \\
        --from mmdet --to detectron2 --config-file configs/vfnet_R_50_FPN_1x.yaml
    iou-d2 convert resnext101_64x4d.pth X_101.pkl \\
        --from torchvision --to detectron2

VFNet, ATSS and FCOS are converted whole; of any other model the ResNet or ResNeXt and the FPN.
Prints which tensors are left over and what the config has to say. Nothing that is in a file is run
without --trust-weights.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections import Counter, OrderedDict
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from iou_d2 import get_config
from iou_d2.commands.errors import ending_in_a_sentence
from iou_d2.commands.trained import add_trust_argument
from iou_d2.engine.config_checks import check_config
from iou_d2.engine.convert import (
    DETECTRON2_PIXELS,
    LAYOUTS,
    WITH_DETECTRON2_PIXELS,
    PixelFormat,
    Translated,
    backbone_prefix,
    has_linear_p7,
    pixel_format_of_mmdet,
    settings_of_mmdet,
    swap_red_and_blue,
    translate,
    translate_tensors,
)
from iou_d2.engine.safe_load import read_checkpoint_file
from iou_d2.errors import InputError

COUNTER = "num_batches_tracked"  # of BatchNorm; Detectron2's FrozenBatchNorm2d has none


class Checkpoint(NamedTuple):
    """Tensors by name, what else its state dict holds, the names of the classes that it knows, and
    the text of its mmdetection config."""

    tensors: dict[str, Tensor]
    other: list[str]
    class_names: list[str]
    config_text: str


def entry(node: dict, *keys: str) -> dict:
    """The first of the dicts that `node` has under `keys`, or an empty one."""
    return next((node[key] for key in keys if isinstance(node.get(key), dict)), {})


def read_checkpoint(path: str, trust: bool = False) -> Checkpoint:
    """The state dict in `path`, which may lie in the "state_dict" of mmdetection or the "model" of
    Detectron2."""
    content = read_checkpoint_file(path, trust)
    state = entry(content, "state_dict", "model")
    state = {**state, **entry(content, COUNTER)} if state else content
    tensors, other = {}, []
    for name, value in state.items():
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.array(value))
        if isinstance(value, Tensor):
            tensors[str(name).removeprefix("module.")] = value.detach()
        else:
            other.append(str(name))

    meta = entry(content, "meta")
    known = {**content, **entry(meta, "dataset_meta"), **meta}
    names = known.get("CLASSES") or known.get("classes") or known.get("class_names")
    names = [str(name) for name in names] if isinstance(names, (list, tuple)) else []
    return Checkpoint(tensors, other, names, str(meta.get("cfg") or meta.get("config") or ""))


def convert_tensors(path: str, tensors: dict, source: str, target: str) -> Translated:
    """`translate_tensors`, with a sentence where it finds nothing."""
    translated = translate_tensors(tensors, source, target)
    if translated.names:
        return translated
    likely = [x for x in LAYOUTS if x not in (source, target) and translate(tensors, x, target)]
    hint = f" Its names are those of {likely[0]}." if likely else ""
    first = f"the first is {next(iter(tensors))}" if tensors else "it has none"
    raise InputError(f"No tensor in {path} has a name of {source}: {first}.{hint}")


def read_config(config_file: str, overrides: list[str]) -> CfgNode:
    cfg = get_config(config_file, [*overrides, "MODEL.DEVICE", "cpu"])
    check_config(cfg)
    return cfg


def check_units(cfg: CfgNode, config_file: str) -> None:
    """Raise an InputError for a quality head whose distances are in units that are ours alone."""
    node = cfg.MODEL.POINT_DETECTOR
    is_ours = (cfg.MODEL.META_ARCHITECTURE, node.HEAD) == ("PointDetector", "QualityHead")
    if is_ours and node.BOX_CODEC == "exp" and set(node.DISTANCE_UNITS) != {1}:
        raise InputError(
            f"The distances of {config_file} are in MODEL.POINT_DETECTOR.DISTANCE_UNITS "
            f"{list(node.DISTANCE_UNITS)}, and no other code has such an ATSS or FCOS."
        )


def pixel_format_of_config(cfg: CfgNode) -> PixelFormat:
    mean, std = tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)
    return PixelFormat(cfg.INPUT.FORMAT, mean, std, cfg.MODEL.RESNETS.STRIDE_IN_1X1)


def compare_with_model(tensors: dict[str, Tensor], cfg: CfgNode) -> tuple[list[str], list[str]]:
    """Names in the model of `cfg` that are not in `tensors`, and the other way round.

    Raises InputError where a tensor has another shape than the model's.
    """
    state = build_model(cfg).state_dict()
    if not backbone_prefix(tensors):  # a ResNet alone, which Detectron2 finds without the prefix
        tensors = {backbone_prefix(state) + name: x for name, x in tensors.items()}
    conflicts = [
        f"{name} is {tuple(tensors[name].shape)} and not {tuple(value.shape)}"
        for name, value in state.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if conflicts:
        raise InputError(
            f"{len(conflicts)} tensors do not have the shapes of the config, so nothing was "
            f"written: {', '.join(conflicts[:5])}."
        )
    missing = [name for name in state if name not in tensors and not name.endswith(COUNTER)]
    unused = [name for name in tensors if name not in state and not name.endswith(COUNTER)]
    return missing, unused


def pack(tensors: dict[str, Tensor], class_names: list[str], target: str, path: str) -> dict:
    """What is written to `path`, in the layout `target`."""
    if target == "torchvision":
        return OrderedDict(tensors)
    if target == "mmdet":
        meta = {"CLASSES": tuple(class_names)} if class_names else {}
        return {"meta": meta, "state_dict": OrderedDict(tensors)}
    # The counters are kept for the way back only.
    counters = {name: x for name, x in tensors.items() if name.endswith(COUNTER)}
    model = {name: x for name, x in tensors.items() if name not in counters}
    if path.endswith(".pkl"):
        model, counters = to_numpy(model), to_numpy(counters)
    return {
        "model": model,
        COUNTER: counters,
        "class_names": class_names,
        "matching_heuristics": not backbone_prefix(tensors),
        "__author__": "iou_d2",
    }


def to_numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    try:
        return {name: x.numpy() for name, x in tensors.items()}
    except TypeError as error:
        raise InputError("NumPy has no bfloat16, so OUT can only be a .pth.") from error


def write_file(content: dict, path: str) -> None:
    """Write `path` whole or not at all."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    unfinished = f"{path}.{os.getpid()}.part"
    try:
        with open(unfinished, "wb") as file:
            if path.endswith(".pkl"):
                pickle.dump(content, file, protocol=4)
            else:
                torch.save(content, file)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def check_paths(args: argparse.Namespace) -> None:
    if os.path.isdir(args.output):
        raise InputError(f"OUT is the folder {args.output}; give the name of a file.")
    if args.output.endswith(".pkl") and args.target != "detectron2":
        raise InputError(f"OUT is {args.output}, but only Detectron2 reads .pkl files.")
    if not os.path.exists(args.output):
        return
    if os.path.exists(args.input) and os.path.samefile(args.input, args.output):
        raise InputError(f"IN and OUT are the same file, {args.input}.")
    if not args.force:
        raise InputError(f"{args.output} is there already; --force overwrites it.")


def print_names(title: str, names: list[str]) -> None:
    """Print `names`, those that differ by numbers only on one line."""
    alike = Counter(re.sub(r"\d+", "#", name) for name in names)
    if names:
        print(f"{title}: {len(names)}")
    for name in names:
        count = alike.pop(re.sub(r"\d+", "#", name), 0)
        if count:
            print(f"  {name}" + (f" and {count - 1} like it" if count > 1 else ""))


def print_settings(pixels: PixelFormat, target: str) -> None:
    """Print what a config of `target` has to say for the weights to be right."""
    mean, std = list(pixels.mean), list(pixels.std)
    if target == "detectron2":
        print(
            f"The config needs: INPUT.FORMAT {pixels.order} MODEL.PIXEL_MEAN {mean} "
            f"MODEL.PIXEL_STD {std} MODEL.RESNETS.STRIDE_IN_1X1 {pixels.stride_in_1x1}"
        )
    else:
        style = "caffe" if pixels.stride_in_1x1 else "pytorch"
        print(f"The model takes {pixels.order}, mean={mean}, std={std}; its style is {style!r}.")


def print_assumptions(
    args: argparse.Namespace, cfg: CfgNode | None, config_text: str, swapped: bool
) -> None:
    """Print what is taken for granted of an mmdetection checkpoint and may not be so."""
    if args.source != "mmdet":
        return
    if swapped and not config_text:
        print(f"{args.input} holds no config: it is taken to be of RGB, so red and blue changed.")
    if cfg and has_linear_p7(config_text) and "linear_p7" not in cfg.MODEL.BACKBONE.NAME:
        print(
            f"{args.input} has no ReLU between p6 and p7, but {args.config_file} has one: its "
            f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, see those with linear_p7."
        )
    for key, value in settings_of_mmdet(config_text).items():
        if cfg and cfg.MODEL.POINT_DETECTOR[key] != value:
            print(f"The config needs: MODEL.POINT_DETECTOR.{key} {value}")


def change_of_pixels(
    args: argparse.Namespace, cfg: CfgNode | None, config_text: str
) -> tuple[bool, PixelFormat | None]:
    """Whether red and blue change places, and what the model of OUT takes, where that is known."""
    order = args.format or (cfg and cfg.INPUT.FORMAT)
    if cfg and order != cfg.INPUT.FORMAT:
        raise InputError(
            f"--format is {order}, but INPUT.FORMAT in {args.config_file} is {cfg.INPUT.FORMAT}."
        )
    if {args.source, args.target} <= set(WITH_DETECTRON2_PIXELS):
        if args.format and not cfg:
            raise InputError(
                f"--format is for mmdet and torchvision: the pixels of {args.source} and "
                f"{args.target} are those of their Detectron2 config."
            )
        return False, pixel_format_of_config(cfg) if cfg else None
    if args.source in WITH_DETECTRON2_PIXELS and args.source != "detectron2":
        return True, DETECTRON2_PIXELS.in_order("RGB")
    if args.source != "detectron2":
        pixels = pixel_format_of_mmdet(config_text)
        return order not in (None, pixels.order), pixels.in_order(order or pixels.order)
    if cfg and cfg.MODEL.RESNETS.STRIDE_IN_1X1 and args.target == "torchvision":
        raise InputError("MODEL.RESNETS.STRIDE_IN_1X1 is on, which no ResNet of torchvision has.")
    return order == "BGR", pixel_format_of_config(cfg).in_order("RGB") if cfg else None


def convert(args: argparse.Namespace) -> None:
    """Read IN, convert, compare with the config, write OUT, and print what is left over."""
    check_paths(args)
    cfg = read_config(args.config_file, args.opts) if args.config_file else None
    if cfg:
        check_units(cfg, args.config_file)
    checkpoint = read_checkpoint(args.input, args.trust_weights)
    tensors, names, told = convert_tensors(args.input, checkpoint.tensors, args.source, args.target)
    swap, pixels = change_of_pixels(args, cfg, checkpoint.config_text)
    if swap:
        tensors = swap_red_and_blue(tensors)

    missing, unused = [], []
    if cfg:
        ours = checkpoint.tensors if args.source == "detectron2" else tensors
        missing, unused = compare_with_model(ours, cfg)
    write_file(pack(tensors, checkpoint.class_names, args.target, args.output), args.output)

    print(f"{args.output} has {len(tensors)} of {len(checkpoint.tensors)} tensors of {args.input}.")
    for change in told:
        print(f"Changed beside names: {change}.")
    print_assumptions(args, cfg, checkpoint.config_text, swap)
    left = [name for name in checkpoint.tensors if name not in names]
    print_names("Left over, without a counterpart", left + checkpoint.other)
    print_names(f"In the model of {args.config_file}, but not filled", missing)
    print_names(f"Not in the model of {args.config_file}", unused)
    if pixels is None:
        order = "is RGB" if args.format else "is that of the Detectron2 config too"
        print(f"Pixel mean and std are those of the Detectron2 config; the order {order}.")
    elif not (cfg and args.target == "detectron2" and pixels == pixel_format_of_config(cfg)):
        print_settings(pixels, args.target)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT", help="a .pth, or for Detectron2 also a .pkl")
    parser.add_argument("--from", required=True, choices=LAYOUTS, dest="source")
    parser.add_argument("--to", required=True, choices=LAYOUTS, dest="target")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="of the Detectron2 model; names and shapes are compared",
    )
    parser.add_argument(
        "--format",
        choices=("RGB", "BGR"),
        help="order of channels that the Detectron2 model takes (default: as --config-file, or "
        "else as IN); the other layouts are written for RGB",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    add_trust_argument(parser)
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="overrides of --config-file"
    )
    args = parser.parse_args(arguments)
    if args.source == args.target:
        parser.error("--from and --to are the same layout.")
    if "detectron2" not in (args.source, args.target) and (args.config_file or args.format):
        parser.error("--config-file and --format are for a Detectron2 model, and there is none.")
    if args.opts and not args.config_file:
        parser.error("--opts are overrides of a --config-file, and there is none.")
    with ending_in_a_sentence():
        convert(args)


if __name__ == "__main__":
    main()
