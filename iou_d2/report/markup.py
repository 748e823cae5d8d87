"""HTML from text that may be anything: what is not marked safe is escaped."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

DASH = "–"  # for what is not defined
_LONG = 24  # rows: longer tables scroll within themselves


class Safe(str):
    """Text that is HTML already."""


def escape(text: object) -> Safe:
    """`text` as HTML shows it. Names of files that are no UTF-8 get question marks."""
    if isinstance(text, Safe):
        return text
    return Safe(html.escape(str(text).encode("utf-8", "replace").decode("utf-8")))


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """Rounded; a dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return DASH
    value += 0.0  # no -0
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def table(
    head: Sequence[object], rows: Sequence[Sequence[object]], label: str, css: str = ""
) -> Safe:
    """A table that scrolls sideways where it is wider than the page; its first column are heads."""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(cell if _is_cell(cell) else f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    long = " long" if len(rows) > _LONG else ""
    return Safe(
        f'<div class="scroll{long}" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="{css}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _is_cell(cell: object) -> bool:
    return isinstance(cell, Safe) and cell.startswith("<td")


def bar_cell(value: float | None, largest: float = 100, series: int = 0) -> Safe:
    """A table cell with a number and a bar of its length."""
    share = 0.0 if value is None or not math.isfinite(value) else max(0.0, value / largest)
    style = f"--share:{min(1.0, share):.3f};--color:var(--c{series % 8})"
    return Safe(f'<td class="bar" style="{style}">{escape(number(value))}</td>')


def section(identity: str, title: str, *parts: str, intro: str = "") -> Safe:
    """Empty where it has no parts."""
    content = "".join(part for part in parts if part)
    if not content:
        return Safe("")
    intro = f'<p class="intro">{escape(intro)}</p>' if intro else ""
    return Safe(f'<section id="{identity}"><h2>{escape(title)}</h2>{intro}{content}</section>')


def grid(parts: Sequence[str]) -> Safe:
    parts = [part for part in parts if part]
    return Safe(f'<div class="grid">{"".join(parts)}</div>') if parts else Safe("")


def embedded_json(data: Any) -> str:
    """JSON that may stand in a script element: no "<" ends it, and NaN and infinity are null."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
