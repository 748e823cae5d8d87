"""What reading images costs: ms an image of each way to decode JPEG, and data time in training.

    python benchmarks/pipeline.py [--folder IMAGES] [--config CONFIG] [--size 800 1333] ...

Without --folder, JPEGs of --sides pixels are made in a temporary folder. The first table has what
each way of reading gives at the size of training: ms to decode and to resize, and how far its
pixels are from those of Detectron2's `read_image`, which training uses. The second one has, for 0,
1 and 2 workers, how long a training step waits for its data; the images have made-up boxes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from PIL import Image
from tabulate import tabulate
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from common import in_turn, machine, training_step
from iou_d2 import get_config
from iou_d2.commands.run_data import Start, use_datasets
from iou_d2.engine.train_data import TrainData

Read = Callable[[Path], np.ndarray]


def make_images(folder: Path, count: int, width: int, height: int) -> None:
    """JPEGs with noise at every scale, alike to that of photographs, and so many bytes a pixel."""
    noise = np.random.default_rng(0)
    for number in range(count):
        image = np.zeros((height, width, 3), dtype=np.float32)
        for level in range(1, 8):
            cells = noise.normal(size=(-(-height // 2**level), -(-width // 2**level), 3))
            image += 2**level * cv2.resize(cells.astype(np.float32), (width, height))
        pixels = (128 + image * 40 / image.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.jpg", quality=90)


def training_size(width: int, height: int, size: Sequence[int]) -> tuple[int, int]:
    """(height, width) that Detectron2's ResizeShortestEdge gives."""
    resize = T.ResizeShortestEdge(size[0], size[1], "choice").get_transform(
        np.empty((height, width, 3))
    )
    return resize.new_h, resize.new_w


def pillow(path: Path) -> np.ndarray:
    return read_image(str(path), format="BGR")


def pillow_draft(path: Path, size: Sequence[int]) -> np.ndarray:
    """Decoded at the smallest of 1, 1/2, 1/4 and 1/8 that is no smaller than in training."""
    with Image.open(path) as image:
        height, width = training_size(*image.size, size)
        image.draft("RGB", (width, height))
        return np.asarray(image.convert("RGB"))[:, :, ::-1]


def opencv(path: Path) -> np.ndarray:
    return cv2.imread(str(path))


def torchvision(path: Path) -> np.ndarray:
    pixels = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
    return pixels.permute(1, 2, 0).numpy()[:, :, ::-1]


def resized(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """As in training; `shape` is (height, width)."""
    return T.ResizeTransform(*image.shape[:2], *shape).apply_image(np.ascontiguousarray(image))


def compare_reading(paths: list[Path], size: Sequence[int], rounds: int) -> list[list[str]]:
    """The rows of the first table."""
    shapes = {path: training_size(*Image.open(path).size, size) for path in paths}
    ways: dict[str, Read] = {
        "Pillow, as in training": pillow,
        "Pillow, draft mode": lambda path: pillow_draft(path, size),
        "OpenCV": opencv,
        "torchvision": torchvision,
    }
    decoding = in_turn({n: lambda r=r: list(map(r, paths)) for n, r in ways.items()}, rounds)
    rows, expected = [], [resized(pillow(path), shapes[path]) for path in paths]
    for name, read in ways.items():
        images = [read(path) for path in paths]
        start = time.perf_counter()
        found = [resized(image, shapes[path]) for image, path in zip(images, paths)]
        resizing = (time.perf_counter() - start) / len(paths)
        pairs = zip(found, expected)
        gaps = np.concatenate([np.abs(a.astype(int) - b).ravel() for a, b in pairs])
        decode = statistics.median(decoding[name]) / len(paths)
        ms = [f"{1000 * seconds:.1f}" for seconds in (decode, resizing, decode + resizing)]
        away = [f"{gaps.mean():.3f}", str(gaps.max()), f"{100 * (gaps > 1).mean():.2f}"]
        rows.append([name, *ms, *away])
    return rows


def collation_ms(paths: list[Path], size: Sequence[int]) -> float:
    """Of an image at the size of training, from (H, W, 3) to the tensor that the model takes."""
    shape = training_size(*Image.open(paths[0]).size, size)
    image = resized(pillow(paths[0]), shape)
    run = {"": lambda: torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))}
    return 1000 * statistics.median(in_turn(run, 5)[""])


def write_annotations(paths: list[Path], folder: Path) -> str:
    """The name of a data set of the images, with a box in the middle of each."""
    images, annotations = [], []
    for number, path in enumerate(paths, 1):
        width, height = Image.open(path).size
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        box = [width / 4, height / 4, width / 2, height / 2]
        area = box[2] * box[3]
        known = {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0}
        annotations.append({**known, "bbox": box, "area": area})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    return f"coco:{folder / 'instances.json'}:{paths[0].parent}"


def training_times(args: argparse.Namespace, data: str, folder: Path, workers: int) -> list[str]:
    """A row of the second table: seconds of a step, and of waiting for its data."""
    sizes = ["INPUT.MIN_SIZE_TRAIN", f"({args.size[0]},)", "INPUT.MAX_SIZE_TRAIN", args.size[1]]
    pairs = [*sizes, "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(folder), *args.opts]
    pairs += ["DATALOADER.NUM_WORKERS", workers, "SOLVER.IMS_PER_BATCH", args.batch]
    cfg = get_config(args.config, list(map(str, pairs)))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (data,), ()
    use_datasets(cfg, Start("", []), eval_only=False, resume=False)
    model = build_model(cfg).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8)
    batches = iter(TrainData(cfg))
    waiting, whole = [], []
    for _ in range(args.iterations + 2):  # the first ones start workers and are left out
        start = time.perf_counter()
        batch = next(batches)
        waiting.append(time.perf_counter() - start)
        training_step(model, optimizer, batch)
        whole.append(time.perf_counter() - start)
    wait, step = statistics.mean(waiting[2:]), statistics.mean(whole[2:])
    return [str(workers), f"{step:.3f}", f"{wait:.3f}", f"{100 * wait / step:.1f}"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, help="of JPEGs, in place of made-up ones")
    add("--images", type=int, default=16)
    add("--sides", type=int, nargs=2, default=(4000, 3000), metavar=("WIDTH", "HEIGHT"))
    add("--size", type=int, nargs=2, default=(800, 1333), metavar=("SHORTER", "LONGEST"))
    add("--rounds", type=int, default=3)
    add("--config", default="retinanet_R_50_FPN_1x")
    add("--iterations", type=int, default=10, help="that are timed; 0 leaves training out")
    add("--batch", type=int, default=2, help="images")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="of --config")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.folder is None:
            make_images(folder, args.images, *args.sides)
        paths = sorted(
            path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg")
        )
        paths = paths[: args.images]
        if not paths:
            raise SystemExit(f"There is no JPEG in {folder}.")
        print(f"{machine()}; {len(paths)} images, the first of {Image.open(paths[0]).size}")
        headers = ["reading", "decode, ms", "resize, ms", "both, ms"]
        headers += ["mean difference", "largest", "over 1, %"]
        rows = compare_reading(paths, args.size, args.rounds)
        print(tabulate(rows, headers, "github", disable_numparse=True))
        print(f"Collation: {collation_ms(paths, args.size):.1f} ms an image.\n")
        if not args.iterations:
            return
        data = write_annotations(paths, Path(temporary))
        rows = [training_times(args, data, Path(temporary) / "out", n) for n in (0, 1, 2)]
        headers = ["workers", "s a step", "s waiting for data", "%"]
        print(tabulate(rows, headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
