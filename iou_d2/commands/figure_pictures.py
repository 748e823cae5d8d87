"""The pictures of `iou-d2 figures`: rivals for an object, and paths of boxes.

Shape letters: P paths, T steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog

from iou_d2.analysis.box_pictures import (
    SCORE,
    SIGNAL,
    TRUTH,
    Line,
    PathPanel,
    RivalsPanel,
    plot_paths,
    plot_rivals,
)
from iou_d2.analysis.rivals import ObjectPaths, paths_on_objects
from iou_d2.commands.figure_numbers import rivals_of
from iou_d2.commands.pictures import read_picture
from iou_d2.engine.figures import Gathered

# Steps that a path shows, T of Algorithm 2.
STEPS = 5


def draw_rivals(
    gathered: Gathered, numbers: dict, dataset: str, output: Path, count: int
) -> list[str]:
    """rivals.png of the objects, one an image, for which the second signal picks a box that fits so
    much better than that of the class score; its name. Nothing where there is no such object."""
    candidates = gathered.variants["none"]
    nearest, rivals = rivals_of(gathered.truth, candidates)
    gain = nearest.iou[rivals.by_signal] - nearest.iou[rivals.by_score]
    image_of = np.array([candidates[row]["image_id"] for row in rivals.by_score.tolist()])
    chosen = [p for p in first_of_each(np.argsort(-gain, kind="stable"), image_of) if gain[p] > 0]
    if not chosen:
        return []
    signal = numbers["rivals"]["signal"]
    files = image_files(dataset)
    panels = []
    for place in chosen[:count]:
        truth = gathered.truth["annotations"][rivals.annotation[place]]
        lines = [Line(corners(truth["bbox"]), "object", "", TRUTH)]
        for name, rows, colour in (
            ("class score", rivals.by_score, SCORE),
            (signal, rivals.by_signal, SIGNAL),
        ):
            row = rows[place]
            text = said(candidates[row], nearest.iou[row])
            lines.append(Line(corners(candidates[row]["bbox"]), f"highest {name}", text, colour))
        panels.append(RivalsPanel(rgb(files[truth["image_id"]]), lines))
    plot_rivals(panels, output / "rivals.png", summary(numbers["rivals"]))
    return ["rivals.png"]


def summary(table: dict) -> str:
    """What `rivals_numbers` says, in a line."""
    head = f"{table['objects']} objects with rivals: "
    if table["signal"] == "true IoU":
        return f"{head}the highest class score is not that of the best box for {table['better']}"
    return (
        f"{head}the highest {table['signal']} fits better than the highest class score for "
        f"{table['better']}, worse for {table['worse']}"
    )


def said(row: dict, iou: float) -> str:
    text = f"class score {row.get('cls_score', row['score']):.2f}, IoU {iou:.2f}"
    if "pred_iou" not in row:
        return text
    return f"{text}, predicted {min(max(row['pred_iou'], 0), 1):.2f}"


def draw_paths(
    gathered: Gathered, numbers: dict, dataset: str, output: Path, count: int
) -> list[str]:
    """paths.png of boxes that the ascent moved: the largest gain, the median one, the largest loss;
    its name. Nothing without ascent or boxes on objects."""
    paths = gathered.paths.get("ascent", [])
    on_objects = paths_on_objects(gathered.truth, paths)
    steps = min(STEPS, on_objects.true.shape[1] - 1)
    if not len(on_objects.row) or steps < 1:
        return []
    gain = on_objects.true[:, steps] - on_objects.true[:, 0]
    files = image_files(dataset)
    panels = [
        panel_of(gathered, paths, on_objects, place, title, steps, files)
        for title, place in examples(gain).items()
    ][:count]
    title = (
        f"{len(gain)} boxes on objects, {steps} steps of ascent: IoU rises for {(gain > 0).sum()}, "
        f"falls for {(gain < 0).sum()}, by {gain.mean():+.3f} on average"
    )
    plot_paths(panels, output / "paths.png", title)
    return ["paths.png"]


def examples(gain: np.ndarray) -> dict[str, int]:
    """What is shown -> its place among gains (P,), of which there is one at least."""
    order = np.argsort(-gain, kind="stable")
    middle = order[len(order) // 2]
    named = {"largest gain": order[0], "median": middle, "largest loss": order[-1]}
    return {f"{name}: {gain[place]:+.2f} IoU": int(place) for name, place in named.items()}


def panel_of(
    gathered: Gathered,
    paths: list[dict],
    on_objects: ObjectPaths,
    place: int,
    title: str,
    steps: int,
    files: dict,
) -> PathPanel:
    row = paths[on_objects.row[place]]
    annotation = gathered.truth["annotations"][on_objects.annotation[place]]
    return PathPanel(
        image=rgb(files[row["image_id"]]),
        boxes=np.array(row["boxes"][: steps + 1]),
        true=on_objects.true[place, : steps + 1],
        predicted=on_objects.predicted[place, : steps + 1],
        object_=np.array(corners(annotation["bbox"])),
        title=title,
    )


def first_of_each(order: np.ndarray, group: np.ndarray) -> list[int]:
    """The places of `order` without those whose group came before."""
    seen, kept = set(), []
    for place in order.tolist():
        if group[place] not in seen:
            seen.add(group[place])
            kept.append(place)
    return kept


def image_files(dataset: str) -> dict:
    return {record["image_id"]: record["file_name"] for record in DatasetCatalog.get(dataset)}


def rgb(file: str) -> np.ndarray:
    return np.ascontiguousarray(read_picture(file)[:, :, ::-1])


def corners(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y + h]
