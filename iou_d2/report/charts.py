"""Charts as data, which script.js draws. What is NaN is null in the page, and a gap in a line.

A series has "name", "color" (a number: that of the subject) and "points" [[x, y], ...] or "values".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .markup import Safe, escape

_MAX_POINTS = 400  # of a line: more than a screen shows


class Charts:
    """Collects the charts of a page; `data` is what the script gets."""

    def __init__(self) -> None:
        self.data: list[dict] = []

    def add(self, title: str, chart: dict, note: str = "") -> Safe:
        """The figure that the script draws `chart` into."""
        index = len(self.data)
        self.data.append({**chart, "title": title})
        note = f"<small>{escape(note)}</small>" if note else ""
        return Safe(
            f'<figure data-chart="{index}"><figcaption>{escape(title)}{note}</figcaption>'
            '<div class="plot"></div></figure>'
        )


def line(name: str, x: Sequence[float], y: Sequence[float], color: int = 0) -> dict:
    """A series; of more than 400 points an even subset with the last one."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    keep = np.arange(len(x))
    if len(x) > _MAX_POINTS:
        keep = np.unique(np.linspace(0, len(x) - 1, _MAX_POINTS).round().astype(int))
    points = [[_short(a), _short(b)] for a, b in zip(x[keep], y[keep])]
    return {"name": name, "color": color, "points": points}


def lines(x_label: str, y_label: str, series: Sequence[dict], **options) -> dict:
    """Options: "x_range", "y_range" [low, high]; "x_from_zero", "y_from_zero", "diagonal" and
    "markers" booleans."""
    return {"type": "lines", "x": x_label, "y": y_label, "series": list(series), **options}


def bars(label: str, groups: Sequence[str], series: Sequence[dict]) -> dict:
    """Horizontal bars: of each series one a group."""
    return {"type": "bars", "x": label, "groups": list(groups), "series": list(series)}


def heat(
    x_label: str, y_label: str, x: np.ndarray, y: np.ndarray, color: int = 0, bins: int = 32
) -> dict:
    """How many points fall into each cell of [0, 1] x [0, 1]; what lies outside is left out."""
    cells, _, _ = np.histogram2d(x, y, bins=bins, range=[[0, 1], [0, 1]])
    return {
        "type": "heat",
        "x": x_label,
        "y": y_label,
        "color": color,
        "cells": cells.astype(int).tolist(),
    }


def _short(value: float) -> float:
    """Five digits, which no screen shows, in place of seventeen."""
    return float(f"{value:.5g}")
