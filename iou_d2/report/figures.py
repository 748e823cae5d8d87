"""The sections that show measures: curves, classes, scores, errors, confusion, images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from iou_d2.analysis.average_precision import IOU_THRESHOLDS
from iou_d2.analysis.curves import correlation
from iou_d2.analysis.errors_of_detections import ERROR_TYPES
from iou_d2.analysis.matched_precision import RECALL_LEVELS

from .charts import Charts, bars, heat, line, lines
from .markup import Safe, bar_cell, escape, grid, number, section, table
from .measures import PRECISION_AT, Measures, ranking_signals

_LABELS = {
    "confidence": "score",
    "cls_score": "class score",
    "pred_iou": "predicted IoU",
    "centerness": "centerness",
}
_MEANINGS = {
    "class": "on an object of another class",
    "localisation": "of the right class, IoU with the object 0.1 to 0.5",
    "both": "of another class, and IoU 0.1 to 0.5",
    "duplicate": "on an object that a better scored one has found",
    "background": "on nothing, IoU at most 0.1",
    "missed": "objects that no detection is about",
    "false positives": "all false detections, at no cost of recall",
    "false negatives": "all objects that are not found",
}
_LARGEST_MATRIX = 24  # classes: more are no longer readable
_CONFUSIONS = 12  # most frequent ones that are listed


class Shown(NamedTuple):
    """A subject with measures; `place`, among all subjects, gives its colour."""

    place: int
    name: str
    measures: Measures


def curves(shown: Sequence[Shown], charts: Charts) -> str:
    found = []
    for title, values, note in (
        ("AP by IoU threshold", "by_iou", ""),
        ("Recall by IoU threshold", "recall", "Share of the objects found at any score."),
    ):
        series = [line(s.name, IOU_THRESHOLDS, getattr(s.measures, values), s.place) for s in shown]
        chart = lines("IoU threshold", "%", series, y_range=[0, 100], markers=True)
        found.append(charts.add(title, chart, note))
    for iou in PRECISION_AT:
        series = [
            line(s.name, 100 * RECALL_LEVELS, s.measures.precision[iou], s.place) for s in shown
        ]
        chart = lines("recall (%)", "precision (%)", series, x_range=[0, 100], y_range=[0, 100])
        found.append(charts.add(f"Precision against recall at IoU {iou:g}", chart))
    if not shown:
        return ""
    intro = "Means over classes, of boxes that count as found from an IoU with their object on."
    return section("curves", "Precision and recall", grid(found), intro=intro)


def classes(shown: Sequence[Shown]) -> str:
    if not shown:
        return ""
    names = dict.fromkeys(name for s in shown for name in s.measures.class_names)
    rows = []
    for name in sorted(names, key=lambda name: -_rank(shown[0].measures, name)):
        row = [name, f"{_objects(shown[0].measures, name):,}"]
        rows.append([*row, *_bars(shown, f"AP-{name}")])
    head = ["class", "objects", *(f"AP, {s.name}" if len(shown) > 1 else "AP" for s in shown)]
    by_class = table(head, rows, "AP by class", "bars")
    rows = []
    for size in ("small", "medium", "large"):
        row = [size, f"{shown[0].measures.sizes[size]:,}"]
        rows.append([*row, *_bars(shown, f"AP{size[0]}")])
    by_size = table(["size", *head[1:]], rows, "AP by size", "bars")
    pair = f'<div class="pair">{by_class}{by_size}</div>'
    return section("classes", "AP by class and by size", pair)


def _bars(shown: Sequence[Shown], metric: str) -> list[Safe]:
    return [bar_cell(s.measures.table.get(metric), 100, s.place) for s in shown]


def _rank(measures: Measures, name: str) -> float:
    ap = measures.table.get(f"AP-{name}", np.nan)
    return -1.0 if np.isnan(ap) else ap


def _objects(measures: Measures, name: str) -> int:
    return sum(n for known, n in zip(measures.class_names, measures.objects) if known == name)


def scores(shown: Sequence[Shown], charts: Charts) -> str:
    if not any(len(s.measures.records) for s in shown):
        return ""
    signals = dict.fromkeys(name for s in shown for name in s.measures.calibration)
    scatter = [
        _heat(s, name, charts, len(shown) > 1)
        for name in signals
        for s in shown
        if s.measures.calibration.get(name) is not None
    ]
    diagrams = [_reliability(shown, name, charts) for name in signals]
    rows = []
    for name in signals:
        for s in shown:
            if name in s.measures.calibration:
                rows.append(_calibration_row(s, name))
    head = ["", "", "expected error", "r, IoU > 0.5", "ρ, IoU > 0.5"]
    return section(
        "scores",
        "What scores say",
        grid([*diagrams, *scatter]),
        table(head, rows, "Calibration", "numbers"),
        intro="A score is calibrated where of the detections with 0.7, 70 % find an object at IoU "
        "0.5; a predicted IoU, where their mean IoU is 0.7. The expected error is the mean "
        "distance from that, over ten bins weighted by their detections, those that count for AP: "
        "the best of each image and class, without what lies in crowds; r (Pearson) and ρ "
        "(Spearman) say how well detections that overlap an object are ranked by their IoU.",
    )


def _calibration_row(s: Shown, name: str) -> list:
    found = s.measures.calibration[name]
    error = "not in 0 to 1" if found is None else number(found.error, 3)
    r, rho = (s.measures.correlations[f"{kind}_{name}"] for kind in ("pearson", "spearman"))
    return [s.name, _LABELS[name], error, number(r, 3), number(rho, 3)]


def _reliability(shown: Sequence[Shown], name: str, charts: Charts) -> Safe:
    series = []
    for s in shown:
        found = s.measures.calibration.get(name)
        if found is not None and found.count.sum():
            filled = found.count > 0
            series.append(line(s.name, found.claimed[filled], found.true[filled], s.place))
            series[-1]["weights"] = [int(n) for n in found.count[filled]]
    if not series:
        return Safe("")
    label = _LABELS[name]
    true = "mean true IoU" if name == "pred_iou" else "share that finds an object"
    chart = lines(label, true, series, x_range=[0, 1], y_range=[0, 1], diagonal=True, markers=True)
    note = "Larger dots stand for more detections; the dashed line is a perfect one."
    return charts.add(f"Reliability of the {label}", chart, note)


def _heat(s: Shown, name: str, charts: Charts, several: bool) -> Safe:
    values, true_iou = ranking_signals(s.measures.records)[name], s.measures.records.true_iou
    r, _ = correlation(values, true_iou)
    label = _LABELS[name]
    title = f"{label[0].upper()}{label[1:]} against true IoU{f': {s.name}' if several else ''}"
    note = f"Stronger colour stands for more detections. Over all of them r is {number(r, 2)}."
    return charts.add(title, heat("true IoU", label, true_iou, values, s.place), note)


def errors(shown: Sequence[Shown], charts: Charts) -> str:
    if not shown:
        return ""
    series = [
        {
            "name": s.name,
            "color": s.place,
            "values": [s.measures.error_table.gain[kind] for kind in ERROR_TYPES],
        }
        for s in shown
    ]
    chart = charts.add(
        "What AP50 would gain without each type of error",
        bars("points of AP50", ERROR_TYPES, series),
    )
    rows = []
    for kind, meaning in _MEANINGS.items():
        row = [Safe(f"{escape(kind)}<small>{escape(meaning)}</small>")]
        for s in shown:
            errors_of = s.measures.error_table
            count = errors_of.count.get(kind)
            row += [
                "" if count is None else f"{count:,}",
                number(errors_of.gain[kind]),
            ]
        rows.append(row)
    several = len(shown) > 1
    head = ["error"]
    for s in shown:
        head += [f"number, {s.name}" if several else "number", "dAP50"]
    return section(
        "errors",
        "Errors by type",
        f'<div class="one">{chart}</div>',
        table(head, rows, "Errors by type", "numbers wrapped"),
        intro="As TIDE defines them: each false detection is of one type, and dAP50 is what AP50 "
        "gains where that type alone is mended. Gains do not add up.",
    )


def confusion(shown: Sequence[Shown]) -> str:
    parts = []
    for s in shown:
        if len(s.measures.records) and sum(s.measures.objects) and np.isfinite(s.measures.score):
            name = f"<h3>{escape(s.name)}</h3>" if len(shown) > 1 else ""
            parts.append(f"<div>{name}{_matrix(s.measures)}{_confusions(s.measures)}</div>")
    return section(
        "confusion",
        "Confusion of classes",
        f'<div class="pair">{"".join(parts)}</div>' if parts else "",
        intro="Rows are what objects are, columns what they are taken for, at IoU 0.5 and from the "
        "score on at which F1 is highest.",
    )


def _matrix(measures: Measures) -> Safe:
    counts = measures.confusion
    classes_, keep = len(measures.class_names), np.arange(len(counts))
    note = f"Score at least {number(measures.score, 2)}."
    if classes_ > _LARGEST_MATRIX:
        off = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
        keep = np.sort(np.argsort(-off[:-1], kind="stable")[:_LARGEST_MATRIX])
        keep = np.append(keep, classes_)
        note += f" The {_LARGEST_MATRIX} classes with most errors, of {classes_}."
    names = [*measures.class_names, "nothing"]
    of_row = np.maximum(1, counts.sum(axis=1))
    rows = []
    for i in keep.tolist():
        cells = [_count_cell(counts[i, j], of_row[i], i == j) for j in keep.tolist()]
        rows.append([names[i], *cells])
    head = ["", *(names[j] for j in keep.tolist())]
    return Safe(f"<p><small>{note}</small></p>" + table(head, rows, "Confusion", "matrix"))


def _count_cell(count: int, of_row: int, right: bool) -> Safe:
    if count == 0:
        return Safe('<td class="zero">0</td>')
    kind = "right" if right else "wrong"
    return Safe(f'<td class="{kind}" style="--share:{count / of_row:.3f}">{count:,}</td>')


def _confusions(measures: Measures) -> Safe:
    """The most frequent pairs of two classes, where the matrix is too large to see them."""
    classes_ = len(measures.class_names)
    between = measures.confusion[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    if classes_ < 8 or not between.any():
        return Safe("")
    order = np.argsort(-between, axis=None, kind="stable")[:_CONFUSIONS]
    pairs = [divmod(int(place), classes_) for place in order]
    names = measures.class_names
    rows = [[names[i], names[j], f"{between[i, j]:,}"] for i, j in pairs if between[i, j]]
    return table(["is", "taken for", "number"], rows, "Most frequent confusions", "numbers words")


def images(shown: Sequence[Shown], galleries: Sequence[dict]) -> str:
    """The frame that the script fills."""
    if not any(gallery["images"] for gallery in galleries):
        return ""
    runs = "".join(f'<option value="{n}">{escape(s.name)}</option>' for n, s in enumerate(shown))
    hidden = "" if len(shown) > 1 else " hidden"
    return section(
        "images",
        "Images",
        f'<div class="controls"><label{hidden}>Detector <select id="run">{runs}</select></label>'
        '<div class="choice" id="list" role="group" aria-label="Which images"></div>'
        '<label>Class <select id="class"></select></label>'
        '<div class="choice" id="kinds" role="group" aria-label="Type of error"></div></div>'
        '<p id="shown" role="status"></p><div id="cards"></div>',
        intro="Ground truth beside detections, from the score on at which F1 is highest. Best and "
        "worst are by panoptic quality: the summed IoU of the finds, over finds and half of the "
        "false and the missed.",
    )
