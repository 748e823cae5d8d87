"""`iou-d2 zoo pair`: paired tests of rows against their baselines, from the results of the runs."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iou_d2.analysis.comparison import same_truth
from iou_d2.analysis.matching import best_of_each_image
from iou_d2.analysis.paired_test import Difference, drawn_metrics, paired_test
from iou_d2.commands.report_runs import subject_of_run
from iou_d2.errors import InputError
from iou_d2.zoo import (
    Comparison,
    Plan,
    Run,
    comparisons,
    keep_test,
    kept_test,
    path_of,
    read_plan,
    recorded_in,
)


def pair(args: argparse.Namespace) -> None:
    """Test each chosen row whose records have no test yet, where the runs of these are there."""
    plan = read_plan(args.plan, args.records)
    for comparison in chosen(plan, args.only):
        if kept_test(plan, comparison) is not None:
            continue
        try:
            print(pair_row(plan, comparison, args.output, args.draws), flush=True)
        except InputError as error:
            print(f"{comparison.name} is left out: {error}", flush=True)


def chosen(plan: Plan, patterns: Sequence[str]) -> list[Comparison]:
    """The rows whose name, TABLE/SET/ROW, fits one of the patterns; all without any."""
    found = [
        comparison
        for comparison in comparisons(plan)
        if not patterns or any(fnmatch.fnmatch(comparison.name, p) for p in patterns)
    ]
    if not found:
        raise InputError(
            f"No row of {plan.path} with a baseline is called {' or '.join(patterns)}."
        )
    return found


def pair_row(plan: Plan, comparison: Comparison, output: Path, draws: int) -> str:
    """Keep the test of a row, and put it into words.

    Raises InputError: a run whose record is kept is not under `output`, or holds no results.
    """
    pairs = comparison.pairs(plan)
    if not pairs:
        raise InputError("no seed has a record of it and of its baseline.")
    folders = [[recorded(plan, run, output) for run in runs] for runs in pairs.values()]
    drawn = [[drawn_of(folder, draws) for folder in both] for both in folders]
    truth = drawn[0][0].truth
    for both in drawn:
        if not all(same_truth(truth, one.truth) for one in both):
            raise InputError("its runs were evaluated on different images or objects.")
    differences = paired_test([tuple(one.metrics for one in both) for both in drawn])
    figures = {metric: as_figures(one) for metric, one in differences.items()}
    keep_test(plan, comparison, {"images": len(truth["images"]), "draws": draws, **figures})
    ap = differences["AP"]
    return (
        f"{comparison.name}, seeds {', '.join(map(str, pairs))}: AP {ap.value:+.1f} over "
        f"{comparison.baseline}, {ap.low:+.1f} to {ap.high:+.1f} over the images."
    )


def recorded(plan: Plan, run: Run, output: Path) -> Path:
    """The folder of the run that a record is of. Raises InputError: it is not under `output`."""
    folder = recorded_in(plan, run, output)
    if folder is None:
        raise InputError(f"the run that {path_of(plan, run)} is of is not under {output}.")
    return folder


class Drawn(NamedTuple):
    truth: dict
    metrics: np.ndarray  # see `drawn_metrics`


@lru_cache(64)  # of a table: its baseline is one of many pairs
def drawn_of(folder: Path, draws: int) -> Drawn:
    """The metrics of a run on the draws. Raises InputError: the run holds no results."""
    subject = subject_of_run(folder, folder.name, command="")
    if subject.results is None:
        raise InputError(" ".join(subject.notes))
    results = best_of_each_image(list(subject.results), subject.max_dets)
    return Drawn(subject.truth, drawn_metrics(subject.truth, results, draws))


def as_figures(test: Difference) -> dict[str, float]:
    figures = {"difference": test.value, "low": test.low, "high": test.high, "p": test.p}
    return {name: round(value, 4) for name, value in figures.items()}
