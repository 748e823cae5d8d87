"""Make a set of the generated dataset `shapes`, and draw a contact sheet of one.

python tools/make_shapes.py shapes_train_5000x128
python tools/make_shapes.py --split val --images 50 --pixels 128 --seed 7 --out my_shapes
python tools/make_shapes.py shapes_val --contact-sheet docs/shapes.png
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from PIL import Image

from iou_d2.data.shapes import ShapesSpec, ensure_shapes, parse_shapes_name, write_shapes
from iou_d2.data.shapes_image import CLASSES

ROWS, COLUMNS, TILE = 4, 8, 152
LEGEND_HEIGHT = 26
# One colour a class and one for crowd regions, BGR.
COLOURS = [(0, 0, 255), (255, 80, 0), (0, 220, 0), (0, 230, 255), (255, 0, 255), (255, 255, 255)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="shapes_<split>[_<images>x<pixels>]")
    parser.add_argument("--out", type=Path, help="a new folder, for a set without a name")
    parser.add_argument("--split", choices=["train", "val"], default="train", help="with --out")
    parser.add_argument("--images", type=int, default=1000, help="with --out")
    parser.add_argument("--pixels", type=int, default=256, help="a side, with --out")
    parser.add_argument("--seed", type=int, default=0, help="with --out")
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="FILE.png", help="draw its first images"
    )
    args = parser.parse_args()
    if (args.name is None) == (args.out is None):
        parser.error("give either the name of a set or --out.")
    if args.out and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out takes a new or an empty folder, and {args.out} is neither.")
    return args


def make_set(args: argparse.Namespace) -> Path:
    """Make the set and return its folder."""
    if args.out:
        write_shapes(ShapesSpec(args.split, args.images, args.pixels, args.seed), args.out)
        return args.out
    parse_shapes_name(args.name)
    ensure_shapes(args.name)
    return Path(MetadataCatalog.get(args.name).json_file).parent


def draw_contact_sheet(folder: Path) -> np.ndarray:
    """The first images of a set with their boxes, in ROWS x COLUMNS tiles above a legend, BGR."""
    data = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
    annotations = defaultdict(list)
    for annotation in data["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    sheet = np.zeros((ROWS * TILE + LEGEND_HEIGHT, COLUMNS * TILE, 3), np.uint8)
    for i, record in enumerate(data["images"][: ROWS * COLUMNS]):
        image = cv2.imread(str(folder / "images" / record["file_name"]))
        top, left = i // COLUMNS * TILE, i % COLUMNS * TILE
        sheet[top : top + TILE, left : left + TILE] = draw_tile(image, annotations[record["id"]])
    names = [*CLASSES, "crowd region"]
    for i, (name, colour) in enumerate(zip(names, COLOURS)):
        place = (8 + i * sheet.shape[1] // len(names), sheet.shape[0] - 8)
        cv2.putText(sheet, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)
    return sheet


def draw_tile(image: np.ndarray, annotations: list[dict]) -> np.ndarray:
    """An image shrunk to a tile with a black edge, and its boxes."""
    scale = TILE / image.shape[0]
    tile = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA)
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        first = (round(x * scale), round(y * scale))
        last = (round((x + width) * scale) - 1, round((y + height) * scale) - 1)
        colour = COLOURS[-1] if annotation["iscrowd"] else COLOURS[annotation["category_id"] - 1]
        cv2.rectangle(tile, first, last, colour, 1 + annotation["iscrowd"])
    return cv2.rectangle(tile, (0, 0), (TILE - 1, TILE - 1), (0, 0, 0), 1)


def main() -> None:
    args = parse_args()
    folder = make_set(args)
    print(f"The set is in {folder}")
    if args.contact_sheet:
        # A palette keeps the picture small enough for a README.
        picture = Image.fromarray(draw_contact_sheet(folder)[:, :, ::-1]).quantize(256)
        picture.save(args.contact_sheet, optimize=True)
        print(f"The contact sheet is in {args.contact_sheet}")


if __name__ == "__main__":
    main()
