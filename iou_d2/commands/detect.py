"""Detect objects in pictures, folders, globs or a video with a trained model.

    iou-d2 detect --config output/x/config.yaml --input image.jpg folder "more/*.png" \\
        --output drawn MODEL.WEIGHTS output/x/model_final.pth
    iou-d2 detect --model model.onnx --input folder --output drawn

--output receives each picture with its detections drawn, or the video, and detections.json. A
picture whose ending OpenCV does not write, such as .jfif, is written as .png. One that cannot be
read is reported, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import tqdm
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances

from iou_d2 import get_config
from iou_d2.commands.arguments import IMAGE_ENDINGS, Names
from iou_d2.commands.exported import ExportedPredictor
from iou_d2.commands.output import make_folder, write_whole
from iou_d2.commands.pictures import picture_names, read_picture, write_picture
from iou_d2.commands.trained import add_trust_argument, fill, names_in, read_weights
from iou_d2.config import set_class_names
from iou_d2.detectors.visualize import detection_label, draw_boxes
from iou_d2.engine.checkpoint import untrained_predictor, use_tta
from iou_d2.engine.config_checks import check_config, require_detections
from iou_d2.errors import InputError, MissingFileError
from iou_d2.evaluation.coco import OPTIONAL_FIELDS


def find_images(inputs: list[str]) -> list[str]:
    """The image files that `inputs` name: files, folders (not the folders inside) and globs."""
    files = []
    for name in inputs:
        if os.path.isdir(name):
            found = sorted(
                str(p) for p in Path(name).iterdir() if p.suffix.lower() in IMAGE_ENDINGS
            )
        else:
            found = [name] if os.path.isfile(name) else sorted(glob.glob(os.path.expanduser(name)))
        if not found:
            raise MissingFileError(f"--input {name} names no image.")
        files += found
    return files


def read_frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        found, frame = video.read()
        if not found:
            return
        yield frame


class Demo:
    """A predictor that draws what it finds and puts it into words."""

    def __init__(
        self,
        predictor: DefaultPredictor | ExportedPredictor,
        class_names: Sequence[str],
        threshold: float,
    ):
        """
        Args:
            class_names: where there are none, classes are called by their number.
            threshold: detections with a lower score are left out of pictures and JSON.
        """
        self.predictor = predictor
        self.class_names = class_names
        self.threshold = threshold

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, list[dict]]:
        """(H, W, 3) uint8 BGR -> the picture with boxes drawn, and its detections, best first."""
        instances = self.predictor(image)["instances"].to("cpu")
        instances = instances[instances.scores >= self.threshold]
        detections = self.describe(instances)
        labels = [detection_label(d["class"], d["score"], d.get("pred_iou")) for d in detections]
        boxes = instances.pred_boxes.tensor.numpy()
        return draw_boxes(image, boxes, instances.pred_classes.tolist(), labels), detections

    def describe(self, instances: Instances) -> list[dict]:
        detections = []
        for i in range(len(instances)):
            detection = {
                "class": self.class_name(int(instances.pred_classes[i])),
                "score": float(instances.scores[i]),
                "bbox": instances.pred_boxes.tensor[i].tolist(),
            }
            for name, key in OPTIONAL_FIELDS.items():
                if instances.has(name):
                    detection[key] = float(instances.get(name)[i])
            detections.append(detection)
        return detections

    def class_name(self, index: int) -> str:
        return self.class_names[index] if self.class_names else f"class {index}"


def run_on_images(demo: Demo, files: list[str], output: Path, records: list[dict]) -> list[str]:
    """Draw all files that can be read and append what was found to `records`; returns a sentence
    for each of the others."""
    faults = []
    for file, name in zip(tqdm.tqdm(files), picture_names(files)):
        try:
            image = read_picture(file)
        except InputError as error:
            faults.append(str(error))
            continue
        drawn, detections = demo(image)
        write_picture(output / name, drawn)
        height, width = image.shape[:2]
        records.append({"file": file, "height": height, "width": width, "detections": detections})
    return faults


def run_on_video(demo: Demo, file: str, output: Path, records: list[dict]) -> None:
    """Draw all frames and append what was found in each to `records`."""
    video = cv2.VideoCapture(file)
    if not video.isOpened():
        raise InputError(f"{file} cannot be opened as a video.")
    path = output / f"{Path(file).stem}.mp4"
    if path.exists() and path.samefile(file):
        raise InputError(f"The video {file} would be overwritten: give another --output.")
    frames, writer = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), None
    try:
        for index, frame in enumerate(tqdm.tqdm(read_frames(video), total=max(frames, 0))):
            drawn, detections = demo(frame)
            if writer is None:
                rate = video.get(cv2.CAP_PROP_FPS) or 25.0
                writer = open_video(path, rate, (drawn.shape[1], drawn.shape[0]))
            writer.write(np.ascontiguousarray(drawn))
            records.append({"file": file, "frame": index, "detections": detections})
    finally:  # what was drawn until an interruption can be looked at
        if writer is not None:
            writer.release()
    if writer is None:
        raise InputError(f"{file} holds no frame that can be read.")


def open_video(path: Path, rate: float, size: tuple[int, int]) -> cv2.VideoWriter:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise InputError(f"The video {path} cannot be written.")
    return writer


def setup(
    config_file: str, overrides: list[str], trust: bool = False, augments: bool = False
) -> tuple[CfgNode, dict]:
    """The config with the names of the classes, and what its MODEL.WEIGHTS hold. `augments`: see
    `check_config`."""
    cfg = get_config(config_file, overrides)
    check_config(cfg, augments)
    require_detections(cfg)
    checkpoint = read_weights(cfg, trust)
    names = names_in(checkpoint, cfg.MODEL.WEIGHTS) or cfg.MODEL.CLASS_NAMES
    if names:
        set_class_names(cfg, names)
    cfg.freeze()
    return cfg, checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", "--config-file", dest="config_file")
    model.add_argument("--model", metavar="FILE", help="what `iou-d2 export` wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        action=Names,
        metavar="PICTURE",
        help="pictures, folders or globs",
    )
    source.add_argument("--video-input", metavar="FILE")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--confidence-threshold", type=float, default=0.5)
    add_trust_argument(parser)
    parser.set_defaults(more_opts=[])
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    arguments = parser.parse_args(argv)

    if not 0 <= arguments.confidence_threshold <= 1:
        raise InputError(
            f"--confidence-threshold is in [0, 1], but it is {arguments.confidence_threshold}."
        )
    files = find_images(arguments.input) if arguments.input else []
    output = make_folder(arguments.output)
    require_other_folder(files, output)
    overrides = [*arguments.more_opts, *arguments.opts]
    demo = demo_of(arguments, overrides)
    records: list[dict] = []
    faults: list[str] = []
    try:
        if arguments.video_input:
            run_on_video(demo, arguments.video_input, output, records)
        else:
            faults = run_on_images(demo, files, output, records)
    finally:  # what was found until an interruption is kept
        write_whole(output / "detections.json", json.dumps(records, indent=1))
    print(f"Drawn pictures and detections.json are in {output}.")
    if faults:
        sys.exit("\n".join(faults))


def demo_of(arguments: argparse.Namespace, overrides: list[str]) -> Demo:
    """What detects: an exported model, or a trained one."""
    threshold = arguments.confidence_threshold
    if not arguments.model:
        trust = arguments.trust_weights
        cfg, checkpoint = setup(arguments.config_file, overrides, trust, augments=True)
        return trained_demo(cfg, checkpoint, threshold)
    if overrides:
        raise InputError(
            f"--model has no config, of which {overrides[0]} could be a key: export it anew."
        )
    predictor = ExportedPredictor(arguments.model)
    return Demo(predictor, predictor.class_names, threshold)


def trained_demo(cfg: CfgNode, checkpoint: dict, threshold: float) -> Demo:
    """That of what `read_weights` read of MODEL.WEIGHTS."""
    predictor = untrained_predictor(cfg)
    fill(predictor.model, cfg, checkpoint)
    use_tta(predictor, cfg)
    return Demo(predictor, cfg.MODEL.CLASS_NAMES, threshold)


def require_other_folder(files: list[str], output: Path) -> None:
    """Raise an InputError where drawn pictures would replace those that they are drawn of."""
    for name in picture_names(files):
        path = output / name
        if path.exists() and any(path.samefile(file) for file in files):
            raise InputError(f"{path} would be overwritten: give another --output.")


if __name__ == "__main__":
    main()
