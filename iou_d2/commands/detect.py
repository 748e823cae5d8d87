"""Detect objects in pictures, folders, globs or a video with a trained model.

    iou-d2 detect --config output/x/config.yaml --input image.jpg folder "more/*.png" \\
        --output drawn MODEL.WEIGHTS output/x/model_final.pth

--output receives each picture with its detections drawn, or the video, and detections.json.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import tqdm
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager

from iou_d2 import get_config
from iou_d2.config import set_class_names
from iou_d2.detectors.visualize import detection_label, draw_boxes
from iou_d2.engine.checkpoint import SafeCheckpointer
from iou_d2.engine.safe_load import read_checkpoint_file
from iou_d2.evaluation.coco import OPTIONAL_FIELDS

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}


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
            raise FileNotFoundError(f"--input {name} names no image.")
        files += found
    return files


def unlike_names(names: list[str]) -> list[str]:
    """`names` of files, of which equal ones are told apart by a number: x.png, x_2.png."""
    unlike, taken = [], set()
    for wanted in names:
        stem, ending = os.path.splitext(wanted)
        name, number = wanted, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}{ending}"
        taken.add(name)
        unlike.append(name)
    return unlike


def read_frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        found, frame = video.read()
        if not found:
            return
        yield frame


class Demo:
    """A predictor that draws what it finds and puts it into words."""

    def __init__(self, cfg: CfgNode, checkpoint: dict, threshold: float):
        """
        Args:
            cfg: where it has no MODEL.CLASS_NAMES, classes are called by their number.
            checkpoint: what `read_checkpoint_file` read of MODEL.WEIGHTS.
            threshold: detections with a lower score are left out of pictures and JSON.
        """
        untrained = cfg.clone()
        untrained.defrost()
        untrained.MODEL.WEIGHTS = ""
        self.predictor = DefaultPredictor(untrained)
        SafeCheckpointer(self.predictor.model, content=checkpoint).load(cfg.MODEL.WEIGHTS)
        self.class_names = cfg.MODEL.CLASS_NAMES
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


def run_on_images(demo: Demo, files: list[str], output: Path) -> list[dict]:
    records = []
    names = unlike_names([os.path.basename(file) for file in files])
    for file, name in zip(tqdm.tqdm(files), names):
        try:
            image = read_image(file, format="BGR")
        except Exception as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from error
        drawn, detections = demo(image)
        if not cv2.imwrite(str(output / name), drawn):
            raise OSError(f"The picture {output / name} cannot be written.")
        height, width = image.shape[:2]
        records.append({"file": file, "height": height, "width": width, "detections": detections})
    return records


def run_on_video(demo: Demo, file: str, output: Path) -> list[dict]:
    video = cv2.VideoCapture(file)
    if not video.isOpened():
        raise ValueError(f"{file} cannot be opened as a video.")
    path = output / f"{Path(file).stem}.mp4"
    frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    records, writer = [], None
    for index, frame in enumerate(tqdm.tqdm(read_frames(video), total=max(frames, 0))):
        drawn, detections = demo(frame)
        if writer is None:
            size = drawn.shape[1], drawn.shape[0]
            rate = video.get(cv2.CAP_PROP_FPS) or 25.0
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
            if not writer.isOpened():
                raise OSError(f"The video {path} cannot be written.")
        writer.write(np.ascontiguousarray(drawn))
        records.append({"file": file, "frame": index, "detections": detections})
    if writer is None:
        raise ValueError(f"{file} holds no frame that can be read.")
    writer.release()
    return records


def setup(config_file: str, overrides: list[str]) -> tuple[CfgNode, dict]:
    """The config with the names of the classes, and what its MODEL.WEIGHTS hold."""
    cfg = get_config(config_file, overrides)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("Nothing is trained: give MODEL.WEIGHTS at the end of the command line.")
    checkpoint = read_checkpoint_file(PathManager.get_local_path(cfg.MODEL.WEIGHTS))
    names = checkpoint.get("class_names") or cfg.MODEL.CLASS_NAMES
    if names:
        set_class_names(cfg, names)
    cfg.freeze()
    return cfg, checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", "--config-file", required=True, dest="config_file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="pictures, folders or globs")
    source.add_argument("--video-input", metavar="FILE")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--confidence-threshold", type=float, default=0.5)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    arguments = parser.parse_args(argv)

    files = find_images(arguments.input) if arguments.input else []
    cfg, checkpoint = setup(arguments.config_file, arguments.opts)
    demo = Demo(cfg, checkpoint, arguments.confidence_threshold)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.video_input:
        records = run_on_video(demo, arguments.video_input, output)
    else:
        records = run_on_images(demo, files, output)
    with open(output / "detections.json", "w") as file:
        json.dump(records, file, indent=1)
    print(f"Drawn pictures and detections.json are in {output}.")


if __name__ == "__main__":
    main()
