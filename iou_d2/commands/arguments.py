"""The arguments by which commands take a config: --config, --train, --test and KEY VALUE pairs.

Needs no torch until `config_of` reads the config.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING

from iou_d2.config_files import find_config

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# A config key where a name could stand: words in capitals joined by dots, or one of the keys that
# lie in no node.
_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR|VIS_PERIOD|CUDNN_BENCHMARK")
# What folders of pictures are searched for.
IMAGE_ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}


def is_key(text: str) -> bool:
    """Whether `text`, where a name could stand, is a config key: no file such as IMG_1.JPG."""
    return (
        _KEY.fullmatch(text) is not None
        and os.path.splitext(text)[1].lower() not in IMAGE_ENDINGS
        and not os.path.exists(text)
    )


class Names(argparse.Action):
    """Collects names of datasets or files; what begins with a config key goes to `more_opts`.

    argparse gives an option with several values all that follows, and so the KEY VALUE pairs too.
    The parser needs `more_opts` among its defaults.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        keys = [index for index, value in enumerate(values) if is_key(value)]
        end = keys[0] if keys else len(values)
        if end == 0:
            wanted = f"at least one {self.metavar}"
            parser.error(f"{option_string} takes {wanted}, but {values[0]} is a key.")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *values[:end]])
        namespace.more_opts = [*namespace.more_opts, *values[end:]]


def _config_path(name: str) -> str:
    try:
        return find_config(name) if name else ""
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config (also --config-file), --train, --test and the KEY VALUE pairs to `parser`, which
    has none of them yet. Call it last, for the pairs are positional.

    The parsed `config_file` is a path, also where a name was given. `config_of` reads them all.
    """
    parser.set_defaults(more_opts=[])
    parser.add_argument(
        "--config",
        "--config-file",
        dest="config_file",
        default="",
        type=_config_path,
        metavar="CONFIG",
        help="name of a config that comes with iou_d2, such as quick/vfnet_own_data, or a file",
    )
    for option, key in (("--train", "DATASETS.TRAIN"), ("--test", "DATASETS.TEST")):
        parser.add_argument(
            option,
            nargs="+",
            action=Names,
            metavar="DATASET",
            help=f"one or more names in place of {key}, such as coco:instances.json",
        )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config"
    )


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-weights",
        action="store_true",
        help="let the file of the weights make any object, and so run any code",
    )


def config_of(args: argparse.Namespace) -> CfgNode:
    """The config that the arguments of `add_config_arguments` name. --train and --test win over
    DATASETS.TRAIN and DATASETS.TEST among the pairs.

    Raises what `iou_d2.get_config` does.
    """
    from iou_d2 import get_config

    cfg = get_config(args.config_file, [*args.more_opts, *args.opts])
    if args.train:
        cfg.DATASETS.TRAIN = tuple(args.train)
    if args.test:
        cfg.DATASETS.TEST = tuple(args.test)
    return cfg
