"""`iou-d2 convert`: checkpoints of other projects as Detectron2's, and back."""

from __future__ import annotations

import argparse
import re
from collections import Counter

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from iou_d2 import get_config
from iou_d2.commands.convert_files import (
    COUNTER,
    Checkpoint,
    check_paths,
    pack,
    read_checkpoint,
    write_file,
)
from iou_d2.commands.convert_pixels import (
    change_of_pixels,
    is_caffe,
    pixel_format_of_config,
    pixel_format_of_source,
    print_settings,
)
from iou_d2.commands.errors import ending_in_a_sentence
from iou_d2.commands.parsers.convert import parse_args
from iou_d2.engine.class_rows import classes_of_model
from iou_d2.engine.config_checks import check_config
from iou_d2.engine.convert import (
    LAYOUTS,
    Translated,
    backbone_prefix,
    has_linear_p7,
    recognise,
    settings_of_mmdet,
    swap_red_and_blue,
    translate,
    translate_tensors,
)
from iou_d2.engine.convert.coco_classes import (
    COCO_NAMES,
    count_classes,
    keep_used_classes,
    names_of_rows,
)
from iou_d2.errors import InputError


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


def with_coco_classes(
    tensors: dict[str, Tensor], model: nn.Module, cfg: CfgNode
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Tensors of a detector of torchvision, the names of its classes, and what changed: `model` of
    80 classes gets those rows alone."""
    classes = classes_of_model(model, cfg)
    names = names_of_rows(count_classes(tensors, classes) or 0)
    if len(names) <= len(COCO_NAMES) or count_classes(model.state_dict(), classes) != len(
        COCO_NAMES
    ):
        return tensors, names, []
    told = (
        f"of {len(names)} rows of classes the {len(COCO_NAMES)} that COCO uses are kept; a softmax "
        "is then over these and the background"
    )
    return keep_used_classes(tensors, names, classes), COCO_NAMES, [told]


def compare_with_model(tensors: dict[str, Tensor], model: nn.Module) -> tuple[list[str], list[str]]:
    """Names in `model` that are not in `tensors`, and the other way round.

    Raises InputError where a tensor has another shape than the model's.
    """
    state = model.state_dict()
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


def print_names(title: str, names: list[str]) -> None:
    """Print `names`, those that differ by numbers only on one line."""
    alike = Counter(re.sub(r"\d+", "#", name) for name in names)
    if names:
        print(f"{title}: {len(names)}")
    for name in names:
        count = alike.pop(re.sub(r"\d+", "#", name), 0)
        if count:
            print(f"  {name}" + (f" and {count - 1} like it" if count > 1 else ""))


def print_assumptions(
    args: argparse.Namespace, cfg: CfgNode | None, checkpoint: Checkpoint, swapped: bool
) -> None:
    """Print what is taken for granted of an mmdetection checkpoint and may not be so."""
    if args.source != "mmdet":
        return
    config_text = checkpoint.config_text
    if not config_text and (swapped or (cfg and is_caffe(cfg))):
        order = pixel_format_of_source(args, cfg, checkpoint).order
        change = "red and blue changed places" if swapped else "red and blue stay"
        print(f"{args.input} holds no config. It is taken to be of {order}, so {change}.")
    if cfg and has_linear_p7(config_text) and "linear_p7" not in cfg.MODEL.BACKBONE.NAME:
        print(
            f"{args.input} has no ReLU between p6 and p7, but {args.config_file} has one: its "
            f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, see those with linear_p7."
        )
    for key, value in settings_of_mmdet(config_text).items():
        if cfg and cfg.MODEL.POINT_DETECTOR[key] != value:
            print(f"The config needs: MODEL.POINT_DETECTOR.{key} {value}")


def print_needs(args: argparse.Namespace, cfg: CfgNode | None, checkpoint: Checkpoint) -> None:
    """Print what neither names nor shapes tell, where the config says otherwise."""
    network = recognise(checkpoint.tensors, args.source)
    for key, value in (network.settings if network else {}).get(args.source, {}).items():
        node = cfg
        for part in key.split(".") if cfg else ():
            node = node[part]
        if node != value and args.target == "detectron2":
            print(f"The config needs: {key} {value}")


def run(args: argparse.Namespace) -> None:
    """Read IN, convert, compare with the config, write OUT, and print what is left over."""
    check_paths(args)
    cfg = read_config(args.config_file, args.opts) if args.config_file else None
    if cfg:
        check_units(cfg, args.config_file)
    checkpoint = read_checkpoint(args.input, args.trust_weights)
    tensors, names, told = convert_tensors(args.input, checkpoint.tensors, args.source, args.target)
    swap, pixels = change_of_pixels(args, cfg, checkpoint)
    if swap:
        tensors = swap_red_and_blue(tensors)

    missing, unused, class_names = [], [], checkpoint.class_names
    if cfg:
        model = build_model(cfg)
        if args.source == "torchvision":
            tensors, class_names, picked = with_coco_classes(tensors, model, cfg)
            told = [*told, *picked]
        ours = checkpoint.tensors if args.source == "detectron2" else tensors
        missing, unused = compare_with_model(ours, model)
    write_file(pack(tensors, class_names, args.target, args.output), args.output)

    print(f"{args.output} has {len(tensors)} of {len(checkpoint.tensors)} tensors of {args.input}.")
    for change in told:
        print(f"Changed beside names: {change}.")
    print_assumptions(args, cfg, checkpoint, swap)
    print_needs(args, cfg, checkpoint)
    left = [name for name in checkpoint.tensors if name not in names]
    print_names("Left over, without a counterpart", left + checkpoint.other)
    print_names(f"In the model of {args.config_file}, but not filled", missing)
    print_names(f"Not in the model of {args.config_file}", unused)
    if pixels is None:
        order = "is RGB" if args.format else "is that of the Detectron2 config too"
        print(f"Pixel mean and std are those of the Detectron2 config; the order {order}.")
    elif not (cfg and args.target == "detectron2" and pixels == pixel_format_of_config(cfg)):
        print_settings(pixels, args.target)


def main(argv: list[str] | None = None) -> None:
    with ending_in_a_sentence():
        run(parse_args(argv))
