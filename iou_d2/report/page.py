"""The page: one HTML file that needs nothing else, of at most LARGEST_PAGE bytes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from string import Template

from .charts import Charts
from .gallery import gallery
from .markup import embedded_json, escape
from .measures import Measures, compare, measure
from .sections import body
from .subject import Subject
from .thumbnails import Thumbnails

LARGEST_PAGE = 5_000_000  # bytes
PICTURES = 20  # of each list of images
_FOR_PICTURES = 3_000_000  # of these bytes


def write_page(
    subjects: Sequence[Subject],
    title: str,
    pictures: int = PICTURES,
    draws: int = 1000,
    measures: Sequence[Measures | None] | None = None,
) -> str:
    """The HTML of a report on at least one subject; several stand side by side.

    Args:
        title: of the page.
        pictures: images in each list of a subject. Where the page would be larger than LARGEST_PAGE
            there are fewer.
        draws: of the paired bootstrap.
        measures: of `measure`, one for each subject; made here where they are not given.

    Raises ValueError: no subjects, or results that do not fit their ground truth.
    """
    if not subjects:
        raise ValueError("A report is on at least one detector.")
    measures = measures or [measure(subject) for subject in subjects]
    tests = compare(measures, draws)
    while True:
        page = _page(subjects, measures, tests, title, pictures)
        if len(page.encode()) <= LARGEST_PAGE or pictures == 0:
            return page
        pictures //= 2


def _page(
    subjects: Sequence[Subject],
    measures: Sequence[Measures | None],
    tests: Sequence,
    title: str,
    pictures: int,
) -> str:
    measured = [(s, m) for s, m in zip(subjects, measures) if m is not None]
    thumbnails = Thumbnails(_FOR_PICTURES // max(1, 3 * pictures * len(measured)))
    galleries = [gallery(s.name, m, s.images, thumbnails, pictures) for s, m in measured]
    charts = Charts()
    content = body(subjects, measures, tests, galleries, thumbnails, charts)
    data = {"charts": charts.data, "galleries": galleries, "thumbnails": thumbnails.data}
    template = Template(_asset("page.html"))
    return template.substitute(
        title=escape(title),
        style=_asset("style.css"),
        body=content,
        data=embedded_json(data),
        script=_asset("script.js"),
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
