"""Seconds and memory to register data as large as COCO's and to build the training loader.

    python benchmarks/register_coco.py [--images 118000] [--boxes 860000] [--no-masks]

Detectron2's own way and that of `iou-d2 train`, which checks the data as well, each in a process of
its own; imports are not timed, but count as memory. The headers of all images, which are read in
the first run on a data set only, are timed apart. Linux only: the peak comes from /proc.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path

from PIL import Image
from tabulate import tabulate

CLASSES = 80
WIDTH, HEIGHT = 640, 480
MOST_LINKS = 30000  # of one file; ext4 allows 65000


def write_data(folder: Path, images: int, boxes: int, masks: bool) -> Path:
    """A COCO file and its images, which are links to a few files."""
    rng = random.Random(0)
    names = [f"{number:012}.png" for number in range(images)]
    (folder / "images").mkdir()
    for number, name in enumerate(names):
        path = folder / "images" / name
        if number % MOST_LINKS == 0:
            Image.new("RGB", (WIDTH, HEIGHT)).save(path)
            source = path
        else:
            os.link(source, path)
    file = folder / "instances.json"
    with file.open("w", encoding="utf-8") as out:
        categories = [{"id": c + 1, "name": f"class {c}"} for c in range(CLASSES)]
        out.write(f'{{"info": {{}}, "categories": {json.dumps(categories)}, "images": [')
        for number, name in enumerate(names):
            image = {"id": number + 1, "file_name": name, "width": WIDTH, "height": HEIGHT}
            out.write((", " if number else "") + json.dumps(image))
        out.write('], "annotations": [')
        for number in range(boxes):
            out.write(
                (", " if number else "") + json.dumps(_annotation(rng, number, images, masks))
            )
        out.write("]}")
    return file


def _annotation(rng: random.Random, number: int, images: int, masks: bool) -> dict:
    w, h = rng.uniform(8, 200), rng.uniform(8, 200)
    x, y = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
    x, y, w, h = (round(v, 2) for v in (x, y, w, h))
    points = [x, y, x + w, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h]
    return {
        "segmentation": [[round(v, 2) for v in points]] if masks else [],
        "area": round(w * h * 0.875, 4),
        "iscrowd": 0,
        "image_id": rng.randrange(images) + 1,
        "bbox": [x, y, w, h],
        "category_id": rng.randrange(CLASSES) + 1,
        "id": number + 1,
    }


def detectron2_way(file: Path) -> dict[str, float]:
    """Seconds of each step until the first batch is there."""
    from detectron2.config import get_cfg
    from detectron2.data import build_detection_train_loader
    from detectron2.data.datasets import register_coco_instances

    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("large",)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 1
    watch = Stopwatch()
    register_coco_instances("large", {}, str(file), str(file.parent / "images"))
    loader = build_detection_train_loader(cfg)
    watch.lap("loader")
    next(iter(loader))
    watch.lap("first batch")
    return watch.laps


def our_way(file: Path) -> dict[str, float]:
    """Seconds of each step until the first batch is there; that of the image headers apart."""
    from iou_d2 import get_config
    from iou_d2.commands import run_data
    from iou_d2.engine.train_data import TrainData

    cfg = get_config("retinanet_R_50_FPN_1x.yaml", ["OUTPUT_DIR", str(file.parent / "out")])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"coco:{file}",), ()
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 1
    watch = Stopwatch()
    check_images = run_data.check_images

    def timed_check(*arguments) -> None:
        watch.lap("register and check")
        check_images(*arguments)
        watch.lap("image headers")

    run_data.check_images = timed_check
    run_data.use_datasets(cfg, run_data.Start("", []), eval_only=False, resume=False)
    data = TrainData(cfg)
    watch.lap("loader")
    next(iter(data))
    watch.lap("first batch")
    return watch.laps


class Stopwatch:
    """Seconds of the processor, which say more than those of the wall on a busy machine."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = time.process_time()

    def lap(self, name: str) -> None:
        now = time.process_time()
        self.laps[name], self._start = now - self._start, now


def peak_memory() -> float:
    """MB. That of getrusage would count the parent's, too."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


def measure(way, file: Path) -> tuple[dict[str, float], float, float]:
    """Seconds of each step; MB at the peak, and after the imports."""
    import detectron2.data  # noqa: F401

    import iou_d2.commands.run_data  # noqa: F401

    imported = peak_memory()
    return way(file), peak_memory(), imported


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=860_000)
    parser.add_argument("--no-masks", dest="masks", action="store_false")
    parser.add_argument("--temporary", help="folder for the data, which are removed at the end")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.temporary) as folder:
        file = write_data(Path(folder), arguments.images, arguments.boxes, arguments.masks)
        size = file.stat().st_size / 1e6
        print(f"{arguments.images} images, {arguments.boxes} boxes, {size:.0f} MB")
        for name, way in (("Detectron2", detectron2_way), ("iou-d2 train", our_way)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                laps, peak, imported = pool.apply(measure, (way, file))
            headers = laps.pop("image headers", None)
            steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in laps.items())
            rows.append([name, sum(laps.values()), headers, peak, imported, steps])
    headers = ["", "seconds", "image headers", "peak MB", "of imports", "steps"]
    print(tabulate(rows, headers, floatfmt=".1f"))
    (_, slow, _, high, *_), (_, fast, _, low, *_) = rows
    print(f"iou-d2 train takes {fast / slow:.2f} of the time and {low / high:.2f} of the memory.")


if __name__ == "__main__":
    main()
