"""`iou-d2 detect`: draws what a trained or an exported model finds in pictures or a video.

Loads torch and Detectron2 for a trained model only."""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import tqdm

from iou_d2.commands.arguments import IMAGE_ENDINGS
from iou_d2.commands.drawing import detection_label, draw_boxes
from iou_d2.commands.exported_file import open_detector
from iou_d2.commands.output import make_folder, write_whole
from iou_d2.commands.parsers.detect import parse_args
from iou_d2.commands.pictures import picture_names, read_picture, write_picture
from iou_d2.dependencies import missing_dependency
from iou_d2.errors import InputError, MissingFileError
from iou_d2.field_names import OPTIONAL_FIELDS


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
    """A detector that draws what it finds and puts it into words."""

    def __init__(
        self,
        detector: Callable[[np.ndarray], dict[str, np.ndarray]],
        class_names: Sequence[str],
        threshold: float,
    ):
        """
        Args:
            detector: answers as one of iou_d2/runtime does.
            class_names: where there are none, classes are called by their number.
            threshold: detections with a lower score are left out of pictures and JSON.
        """
        self.detector = detector
        self.class_names = class_names
        self.threshold = threshold

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, list[dict]]:
        """(H, W, 3) uint8 BGR -> the picture with boxes drawn, and its detections, best first."""
        found = self.detector(image)
        shown = found["scores"] >= self.threshold
        found = {name: values[shown] for name, values in found.items()}
        detections = self.describe(found)
        labels = [detection_label(d["class"], d["score"], d.get("pred_iou")) for d in detections]
        return draw_boxes(image, found["boxes"], found["classes"].tolist(), labels), detections

    def describe(self, found: dict[str, np.ndarray]) -> list[dict]:
        detections = []
        for i in range(len(found["scores"])):
            detection = {
                "class": self.class_name(int(found["classes"][i])),
                "score": float(found["scores"][i]),
                "bbox": found["boxes"][i].tolist(),
            }
            for name, key in OPTIONAL_FIELDS.items():
                if name in found:
                    detection[key] = float(found[name][i])
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


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    files = find_images(args.input) if args.input else []
    output = make_folder(args.output)
    require_other_folder(files, output)
    demo = demo_of(args)
    records: list[dict] = []
    faults: list[str] = []
    try:
        if args.video_input:
            run_on_video(demo, args.video_input, output, records)
        else:
            faults = run_on_images(demo, files, output, records)
    finally:  # what was found until an interruption is kept
        write_whole(output / "detections.json", json.dumps(records, indent=1))
    print(f"Drawn pictures and detections.json are in {output}.")
    if faults:
        sys.exit("\n".join(faults))


def demo_of(args: argparse.Namespace) -> Demo:
    """What detects: an exported model, or a trained one, for which alone torch is loaded."""
    if args.model:
        detector = open_detector(args.model)
        names = detector.description.class_names
    else:
        missing = missing_dependency()
        if missing:
            raise InputError(f"{missing} Exported models alone run without it: see --model.")
        from iou_d2.commands.trained import open_trained

        detector, names = open_trained(args.config_file, args.overrides, args.trust_weights)
    return Demo(detector, names, args.confidence_threshold)


def require_other_folder(files: list[str], output: Path) -> None:
    """Raise an InputError where drawn pictures would replace those that they are drawn of."""
    for name in picture_names(files):
        path = output / name
        if path.exists() and any(path.samefile(file) for file in files):
            raise InputError(f"{path} would be overwritten: give another --output.")
