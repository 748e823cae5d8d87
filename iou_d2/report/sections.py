"""The sections of a page, from top to bottom. Each is empty where there is nothing to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iou_d2.analysis.paired_test import Difference

from . import figures
from .charts import Charts, line, lines
from .markup import DASH, Safe, escape, grid, number, section, table
from .measures import Measures
from .subject import Expected, Subject
from .thumbnails import Thumbnails

_METRICS = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "APs", "APm", "APl")
_HEADLINE = ("AP", "AP50", "AP75", "AP90")
_FROM_ZERO = {"x_from_zero": True, "y_from_zero": True}
_ALIKE = 0.05  # points of AP: rounding


def body(
    subjects: Sequence[Subject],
    measures: Sequence[Measures | None],
    tests: Sequence[dict[str, Difference] | None],
    galleries: Sequence[dict],
    thumbnails: Thumbnails,
    charts: Charts,
) -> str:
    """All that stands in the body of the page but the data and the script."""
    measured = [
        figures.Shown(place, subject.name, found)
        for place, (subject, found) in enumerate(zip(subjects, measures))
        if found is not None
    ]
    parts = [
        ("what", "Overview", _facts(subjects, measures)),
        ("metrics", "Metrics", _metrics(subjects, measures, tests)),
        ("training", "Training", _training(subjects, charts)),
        ("curves", "Precision", figures.curves(measured, charts)),
        ("classes", "Classes", figures.classes(measured)),
        ("scores", "Scores", figures.scores(measured, charts)),
        ("errors", "Errors", figures.errors(measured, charts)),
        ("confusion", "Confusion", figures.confusion(measured)),
        ("images", "Images", figures.images(measured, galleries)),
        ("repeat", "Repeat", _repeat(subjects)),
    ]
    shown = [(identity, name, part) for identity, name, part in parts if part]
    links = "".join(f'<a href="#{identity}">{name}</a>' for identity, name, _ in shown)
    return (
        '<header><div class="head"><h1>'
        + " <span>·</span> ".join(escape(subject.name) for subject in subjects)
        + '</h1><button id="theme" type="button" aria-label="Light or dark">'
        '<span aria-hidden="true"></span></button></div>'
        f'<nav aria-label="Sections">{links}</nav></header><main>'
        + _notes(subjects, measures, thumbnails)
        + _headline(subjects, measures)
        + "".join(part for _, _, part in shown)
        + "</main>"
    )


def _notes(
    subjects: Sequence[Subject], measures: Sequence[Measures | None], thumbnails: Thumbnails
) -> str:
    notes = [(subject.name, note) for subject in subjects for note in subject.notes]
    for subject, found in zip(subjects, measures):
        notes += [(subject.name, note) for note in _doubts(subject, found)]
    for files, what in ((thumbnails.missing, "not there"), (thumbnails.broken, "not readable")):
        if files:
            first = Path(min(files)).name
            are = "image is" if len(files) == 1 else "images are"
            notes.append(("Images", f"{len(files)} {are} {what}, such as {first}: see the cards."))
    items = "".join(f"<li><b>{escape(who)}</b> {escape(note)}</li>" for who, note in notes)
    return f'<ul class="note">{items}</ul>' if items else ""


def _doubts(subject: Subject, measures: Measures | None) -> list[str]:
    """What does not go together: recorded results with those that are counted here."""
    if measures is None:
        return []
    doubts = []
    recorded, counted = subject.recorded.get("bbox/AP"), measures.table["AP"]
    if recorded is not None and abs(recorded - counted) > _ALIKE:
        doubts.append(
            f"The run recorded AP {number(recorded, 2)}, but its results file gives "
            f"{number(counted, 2)}: was one of them replaced? The page shows the results file."
        )
    if not measures.results:
        doubts.append("There is no detection: every AP is 0, and there is nothing to draw.")
    if not sum(measures.objects):
        doubts.append("The ground truth has no objects, so that no AP is defined.")
    return doubts


def _headline(subjects: Sequence[Subject], measures: Sequence[Measures | None]) -> str:
    """The figures that one looks for first."""
    rows = []
    for place, (subject, found) in enumerate(zip(subjects, measures)):
        name = f"<h3>{escape(subject.name)}</h3>" if len(subjects) > 1 else ""
        pairs = [(metric, number(_value(subject, found, metric))) for metric in _HEADLINE]
        if found is not None:
            r = found.correlations["pearson_confidence"]
            pairs.append(("r of score and IoU", number(r, 2)))
        items = "".join(
            f"<div><dd>{escape(value)}</dd><dt>{escape(label)}</dt></div>" for label, value in pairs
        )
        rows.append(
            f'<div class="tiles" style="--color:var(--c{place % 8})">{name}<dl>{items}</dl></div>'
        )
    return f'<div class="headline">{"".join(rows)}</div>'


def _value(subject: Subject, measures: Measures | None, metric: str) -> float | None:
    """Of the results file; what the run recorded where there is none."""
    if measures is not None:
        return measures.table.get(metric)
    return subject.recorded.get(f"bbox/{metric}")


def _facts(subjects: Sequence[Subject], measures: Sequence[Measures | None]) -> str:
    counted = [_counted(found) for found in measures]
    facts = [{**subject.facts, **more} for subject, more in zip(subjects, counted)]
    keys = dict.fromkeys(key for known in facts for key in known)
    rows = [[key, *(known.get(key, DASH) for known in facts)] for key in keys]
    if not rows:
        return ""
    head = ["", *(subject.name for subject in subjects)]
    return section("what", "What was trained on what", table(head, rows, "Facts", "facts"))


def _counted(measures: Measures | None) -> dict[str, str]:
    if measures is None:
        return {}
    objects = sum(measures.objects)
    classes = len(measures.class_names)
    crowds = len(measures.truth["annotations"]) - objects
    return {
        "counted here": f"{len(measures.results):,} detections of {objects:,} objects of "
        f"{classes:,} class{'es' if classes != 1 else ''} in {len(measures.truth['images']):,} "
        f"images{f', and {crowds:,} crowds' if crowds else ''}"
    }


def _metrics(
    subjects: Sequence[Subject],
    measures: Sequence[Measures | None],
    tests: Sequence[dict[str, Difference] | None],
) -> str:
    expected = {f"{e.task}/{e.metric}": None for subject in subjects for e in subject.expected}
    keys = dict.fromkeys([f"bbox/{metric}" for metric in _METRICS] + list(expected))
    keys |= dict.fromkeys(
        key for subject in subjects for key in subject.recorded if key.startswith("voc/")
    )
    rows = []
    for key in keys:
        row = [key.removeprefix("bbox/")]
        for subject, found in zip(subjects, measures):
            value = _any_value(subject, found, key)
            # Correlations are no percentages: they lie between -1 and 1.
            row.append(number(value, 3 if key.startswith("localization/") else 1))
            if expected:
                row.append(_held_against(value, key, subject.expected))
        rows.append(row)
    head = ["%"]
    for subject in subjects:
        head += [subject.name, "expected"] if expected else [subject.name]
    return section(
        "metrics",
        "Metrics",
        table(head, rows, "Metrics", "numbers"),
        _paired(subjects, measures, tests),
        intro="Average precision of boxes as COCO defines it. APs, APm and APl are of objects "
        "up to 32² pixels, up to 96² and larger.",
    )


def _any_value(subject: Subject, measures: Measures | None, key: str) -> float | None:
    task, _, metric = key.partition("/")
    if task == "bbox" and (measures is None or metric in measures.table):
        return _value(subject, measures, metric)
    if task == "localization" and measures is not None and metric in measures.correlations:
        return measures.correlations[metric]
    return subject.recorded.get(key)


def _held_against(value: float | None, key: str, expected: Sequence[Expected]) -> str:
    """The expected value of a metric, and whether `value` is near enough."""
    entry = next((e for e in expected if f"{e.task}/{e.metric}" == key), None)
    if entry is None:
        return ""
    text = escape(f"{entry.value:g} ± {entry.tolerance:g}")
    met = value is not None and abs(value - entry.value) <= entry.tolerance
    word = '<b class="met">met</b>' if met else '<b class="unmet">not met</b>'
    return Safe(f"<td>{text} {word}</td>")


def _paired(
    subjects: Sequence[Subject],
    measures: Sequence[Measures | None],
    tests: Sequence[dict[str, Difference] | None],
) -> str:
    """The paired test of each subject against the first."""
    if len(subjects) < 2:
        return ""
    rows, not_tested = [], []
    for subject, found, test in list(zip(subjects, measures, tests))[1:]:
        if test is None:
            why = "has no results" if found is None else "is not on the same images and objects"
            not_tested.append(f"{subject.name} {why}, and so is not tested.")
            continue
        for metric, d in test.items():
            interval = f"{number(d.low, 1, True)} to {number(d.high, 1, True)}"
            p = "" if d.p != d.p else (f"{d.p:.3f}" if d.p >= 0.001 else "< 0.001")
            rows.append([subject.name, metric, number(d.value, 1, True), interval, p or DASH])
    text = "".join(f"<p>{escape(sentence)}</p>" for sentence in not_tested)
    if rows:
        text += table(["", "", "difference", "95 % interval", "p"], rows, "Paired test", "numbers")
        text += (
            "<p><small>Paired bootstrap over the test images. It says how much the difference "
            "hangs on which images were tested, and nothing of other seeds of the training."
            "</small></p>"
        )
    return f"<h3>Compared with {escape(subjects[0].name)}</h3>{text}"


def _training(subjects: Sequence[Subject], charts: Charts) -> str:
    found = []
    with_ap = [(n, s) for n, s in enumerate(subjects) if s.ap is not None and len(s.ap.values)]
    if any(len(s.ap.values) > 1 for _, s in with_ap):
        series = [line(s.name, *s.ap, color=n) for n, s in with_ap]
        chart = lines("iteration", "AP (%)", series, markers=True, **_FROM_ZERO)
        found.append(charts.add("AP on the test set", chart))
    keys = dict.fromkeys(key for subject in subjects for key in subject.losses)
    for key in keys:
        series = [
            line(subject.name, *subject.losses[key], color=place)
            for place, subject in enumerate(subjects)
            if key in subject.losses
        ]
        found.append(charts.add(key, lines("iteration", "", series, **_FROM_ZERO)))
    keys = dict.fromkeys(key for subject in subjects for key in subject.speed)
    rows = [[key, *(subject.speed.get(key, DASH) for subject in subjects)] for key in keys]
    head = ["", *(subject.name for subject in subjects)]
    speed = f"<h3>Speed</h3>{table(head, rows, 'Speed', 'numbers')}" if rows else ""
    return section("training", "Training", grid(found), speed)


def _repeat(subjects: Sequence[Subject]) -> str:
    text = ""
    for subject in subjects:
        if subject.commands:
            name = f"<h3>{escape(subject.name)}</h3>" if len(subjects) > 1 else ""
            text += f'{name}<pre tabindex="0">{escape(chr(10).join(subject.commands))}</pre>'
    return section("repeat", "The commands that repeat it", text)
