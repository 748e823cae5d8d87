"""Write an exported model with its convolutions in 8 bits.

    python tools/quantize.py --model model.onnx --images pictures/ --output model_int8.onnx

Activations get their ranges from pictures such as the model will see. What is in 8 bits and what it
costs: docs/EXPORT.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from iou_d2.commands.detect import find_images
from iou_d2.commands.output import check_output_file
from iou_d2.commands.pictures import read_picture
from iou_d2.engine.export.quantize import quantize
from iou_d2.runtime import Detector


def inputs_of(model: str | Path, folders: list[str], count: int) -> Iterator[np.ndarray]:
    """What `model` takes, of `count` of the pictures in files and folders, at equal steps."""
    detector = Detector(model)
    names = find_images(folders)
    for index in np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int):
        yield detector.prepare(read_picture(names[index]))[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FILE", help="of `iou-d2 export`, with detections")
    add("--images", required=True, nargs="+", metavar="FOLDER", help="folders, files, globs")
    add("--count", type=int, default=64, metavar="N", help="of the pictures, 64 by default")
    add("--output", required=True, metavar="FILE")
    args = parser.parse_args(argv)
    check_output_file(args.output)
    convolutions = quantize(args.model, args.output, inputs_of(args.model, args.images, args.count))
    before, after = (Path(x).stat().st_size / 2**20 for x in (args.model, args.output))
    print(
        f"{args.output} ({after:.1f} MB of {before:.1f}) computes {convolutions} convolutions in 8 "
        "bits."
    )


if __name__ == "__main__":
    main()
