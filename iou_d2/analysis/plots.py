"""Pictures of records and curves, written to files. Uses no global matplotlib state, no display."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .curves import binned_mean, correlation, select_localized
from .records import Records

_LABELS = {
    "cls_score": "class score",
    "confidence": "confidence",
    "pred_iou": "predicted IoU",
    "centerness": "centerness",
}
_MAX_POINTS = 20_000


def plot_score_vs_iou(records: Records, path: str | os.PathLike, min_iou: float = 0.5) -> Figure:
    """Scatter class score, confidence and, if any, predicted IoU or centerness against the true
    IoU.

    One panel a score, over the detections with true IoU above `min_iou`, with Pearson's r and
    Spearman's rho of all of them in the title and the mean score in each of 20 bins as a line.
    Of more than 20,000 points an even subset is drawn. No detections: empty panels, r = nan.

    Returns:
        The figure, after it was written to `path`.
    """
    keep = select_localized(records, min_iou)
    true_iou = records.true_iou[keep]
    signals = records.signals()
    names = [name for name in _LABELS if name in signals]

    figure = Figure(figsize=(4.2 * len(names), 4.4), layout="constrained")
    figure.suptitle(f"{len(true_iou)} detections with IoU > {min_iou:g}")
    for axes, name in zip(figure.subplots(1, len(names)), names):
        _scatter_panel(axes, true_iou, signals[name][keep], min_iou)
        pearson, spearman = correlation(signals[name][keep], true_iou)
        axes.set_title(f"{_LABELS[name]}: r = {pearson:.3f} (rho = {spearman:.3f})", fontsize=10)
        axes.set_ylabel(_LABELS[name])
    return save(figure, path)


def _scatter_panel(axes, true_iou: np.ndarray, values: np.ndarray, min_iou: float) -> None:
    step = -(-len(true_iou) // _MAX_POINTS) or 1
    axes.scatter(true_iou[::step], values[::step], s=6, alpha=0.25, linewidths=0)
    edges = np.linspace(min_iou, 1, 21)
    means = binned_mean(true_iou, values, edges)
    axes.plot((edges[:-1] + edges[1:]) / 2, means, color="black", marker=".", label="mean")
    finite = values[np.isfinite(values)]
    low, high = finite.min(initial=0), finite.max(initial=1)  # a score may lie outside of [0, 1]
    axes.set(xlabel="true IoU", xlim=(min_iou, 1), ylim=(low, high + 0.02 * (high - low)))
    axes.legend(loc="lower right")


def plot_ap_by_iou(thresholds: np.ndarray, ap: np.ndarray, path: str | os.PathLike) -> Figure:
    """Draw AP (percent) against the IoU threshold it is counted at: both arrays (T,)."""
    figure = Figure(figsize=(4.6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(thresholds, ap, marker="o")
    axes.set(xlabel="IoU threshold", ylabel="AP (%)", ylim=(0, 100), title="AP by IoU threshold")
    axes.grid(alpha=0.3)
    return save(figure, path)


Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]


def plot_curves(
    curves: Curves,
    path: str | os.PathLike,
    *,
    x_label: str,
    y_label: str,
    x_scale: str = "linear",
    marker: str = "",
) -> Figure:
    """Draw curves by name, each two arrays x and y of one shape, and write them to `path`."""
    figure = Figure(figsize=(5.2, 4), layout="constrained")
    axes = figure.subplots()
    _draw_curves(axes, curves, marker)
    axes.set(xlabel=x_label, ylabel=y_label, xscale=x_scale)
    axes.set_ylim(bottom=0)
    return save(figure, path)


def plot_panels(
    panels: Mapping[str, Curves], path: str | os.PathLike, *, x_label: str, marker: str = "o"
) -> Figure:
    """Draw curves in panels, two beside each other, by what is measured; what a panel holds decides
    on its range."""
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(7, 2.6 * rows), layout="constrained")
    places = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, (y_label, curves) in zip(places, panels.items()):
        _draw_curves(axes, curves, marker)
        axes.set(xlabel=x_label, ylabel=y_label)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    return save(figure, path)


def _draw_curves(axes, curves: Curves, marker: str) -> None:
    drawn = [axes.plot(x, y, marker=marker)[0] for x, y in curves.values()]
    axes.grid(alpha=0.3)
    _add_legend(axes, drawn, list(curves))


def _add_legend(axes, drawn: Sequence, names: Sequence[str]) -> None:
    """What was drawn, by names as they are: matplotlib leaves out one that begins with "_"."""
    if not names:
        return
    legend = axes.legend(drawn, [str(number) for number in range(len(names))])
    for text, name in zip(legend.get_texts(), names):
        text.set_text(_plain(name))


def _plain(text: str) -> str:
    """Without the formulas that matplotlib reads between dollar signs."""
    return text.replace("$", r"\$")


def plot_bars(
    groups: dict[str, dict[str, float]],
    path: str | os.PathLike,
    *,
    y_label: str,
    title: str = "",
    x_label: str = "",
) -> Figure:
    """Draw bars side by side, each with its value, and write them to `path`.

    `groups` are bars by the name of their group, and in it by that of their colour; NaN, or a name
    that a group lacks, leaves a gap.
    """
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    figure = Figure(figsize=(2 + 1.1 * len(groups), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(names), 1)
    drawn = []
    for number, name in enumerate(names):
        heights = [bars.get(name, np.nan) for bars in groups.values()]
        x = np.arange(len(groups)) + (number - (len(names) - 1) / 2) * width
        drawn.append(axes.bar(x, heights, width))
        labels = ["" if np.isnan(height) else f"{height:.1f}" for height in heights]
        axes.bar_label(drawn[-1], labels, fontsize=8)
    axes.set(xlabel=x_label, ylabel=y_label, title=_plain(title))
    axes.set_xticks(range(len(groups)), [_plain(name) for name in groups], rotation=20)
    axes.margins(y=0.1)
    _add_legend(axes, drawn, names)
    return save(figure, path)


def save(figure: Figure, path: str | os.PathLike) -> Figure:
    """Write a figure as PNG, and return it."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)
    return figure
