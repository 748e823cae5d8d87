"""Export every method in every format and write what works into docs/EXPORT.md.

    python tools/export_matrix.py --output docs/EXPORT.md [--formats onnx torchscript pt2]
        [--models vfnet unitbox]

Each model is small and of random weights. Its file is run on random images of several sizes and
numbers, and what it detects is matched with what the model detects. The rows between the two marks
in the page are replaced; those of what was not run stay.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from exported_models import (  # noqa: E402
    SMALL_C4,
    noise,
    small_model,
    small_two_stage,
    write_model,
)
from iou_d2.engine.export import build_graph  # noqa: E402
from iou_d2.engine.export.agreement import NOTHING  # noqa: E402
from iou_d2.engine.export.check import compare, load  # noqa: E402

BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"
HEADERS = ("model", "format", "detections", "boxes, px", "scores", "missing + more", "s to export")
SIZES = ((2, 97, 131), (1, 65, 64), (3, 160, 96), (1, 40, 201))
# Of programs in units of the coarsest stride, 64 px at least: many detectors refuse a single one.
PROGRAM_SIZES = ((2, 2, 4), (1, 4, 2), (3, 2, 2))


class Case(NamedTuple):
    name: str
    config: str
    overrides: tuple[str, ...] = ()
    build: Callable = small_model


def two_stage(name: str, config: str, *overrides: str) -> Case:
    return Case(name, config, overrides, small_two_stage)


ANCHORS = ("retinanet", "iou_retinanet", "ssd", "ssd_iou", "refinedet")
POINTS = ("atss", "atss_iou", "fcos", "vfnet_star", "vfnet", "unitbox")
QUICK = (*ANCHORS, *POINTS)
FASTER, IOU_NET = "configs/quick/faster_rcnn_shapes.yaml", "configs/quick/iou_net_shapes.yaml"
MASKS = ("MODEL.MASK_ON", "True")
AGNOSTIC = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
CASES = (
    *(Case(name, f"configs/quick/{name}_shapes.yaml") for name in QUICK),
    Case("vfnet_dcn", "configs/vfnet_R_50_FPN_dcn_2x_ms.yaml"),
    Case("ssd300", "configs/ssd300_VGG16_voc.yaml"),
    Case("ssd512", "configs/ssd512_VGG16_voc.yaml"),
    Case("refinedet320", "configs/refinedet320_VGG16_voc.yaml"),
    two_stage("faster_rcnn", FASTER),
    two_stage("faster_rcnn_prroi", FASTER, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "PrRoIPool"),
    two_stage("mask_rcnn", FASTER, *MASKS),
    two_stage("mask_rcnn_c4", "configs/faster_rcnn_R_50_C4_1x.yaml", *SMALL_C4, *MASKS),
    two_stage("cascade_rcnn", FASTER, "MODEL.ROI_HEADS.NAME", "BoxLossCascadeROIHeads", *AGNOSTIC),
    two_stage("iou_net", IOU_NET),
    two_stage("iou_net_mask", IOU_NET, *MASKS),
    two_stage(
        "iou_net_cascade", IOU_NET, "MODEL.ROI_HEADS.NAME", "IoUNetCascadeROIHeads", *AGNOSTIC
    ),
)
VARIANTS = {
    "onnx": ((17, "GridSample"), (19, "DeformConv"), (22, "GridSample")),
    "torchscript": ((17, "GridSample"),),
    "pt2": ((17, "GridSample"),),
}


def label(format: str, opset: int, deform_conv: str) -> str:
    if format != "onnx":
        return format
    return f"onnx, opset {opset}" + (", DeformConv" if deform_conv == "DeformConv" else "")


def variants(case: Case, format: str) -> list[tuple[int, str]]:
    """Those of VARIANTS that there are of a case."""
    cfg, model = case.build(case.config, *case.overrides)
    graph = build_graph(cfg, model)
    if format == "pt2" and not graph.exports_program:
        return []
    return [
        (opset, deform_conv)
        for opset, deform_conv in VARIANTS[format]
        if opset <= graph.last_opset
        and (deform_conv == "GridSample" or case.name.startswith("vfnet"))
    ]


def row(case: Case, format: str, opset: int, deform_conv: str, folder: Path) -> list:
    cfg, model = case.build(case.config, *case.overrides)
    path, begin = folder / f"model.{format}", time.perf_counter()
    options = {"format": format, "opset": opset, "deform_conv": deform_conv}
    graph = write_model(cfg, model, path, **options)
    seconds = time.perf_counter() - begin
    run, found = load(path, format), NOTHING
    unit = max(graph.coarsest, 64)
    of_program = [(count, rows * unit, columns * unit) for count, rows, columns in PROGRAM_SIZES]
    for shape in of_program if format == "pt2" else SIZES:
        found = found.joined(compare(run, graph, noise(*shape), cfg))
    alone = f"{found.missing} + {found.extra}"
    numbers = (found.pairs, f"{found.boxes:.0e}", f"{found.scores:.0e}", alone, f"{seconds:.0f}")
    return [case.name, label(format, opset, deform_conv), *numbers]


def rows_of(formats: list[str], models: list[str]) -> list[list]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for format in formats:
            for case in (x for x in CASES if x.name in models):
                for opset, deform_conv in variants(case, format):
                    rows.append(row(case, format, opset, deform_conv, Path(folder)))
                    print(*rows[-1], flush=True)
    return rows


def kept_rows(table: str, formats: list[str], models: list[str]) -> list[list[str]]:
    """The rows of a table in Markdown that are of other formats or models."""
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        cells for cells in rows if cells[0] not in models or cells[1].split(",")[0] not in formats
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, metavar="PAGE")
    parser.add_argument("--formats", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    names = [case.name for case in CASES]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = args.formats, args.models
    rows = rows_of(*chosen)
    page = args.output.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    rows = sorted(kept_rows(table, *chosen) + rows, key=lambda cells: cells[1])
    table = tabulate(rows, HEADERS, "github", disable_numparse=True)
    args.output.write_text(f"{before}{BEGIN}{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
