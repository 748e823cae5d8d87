"""`iou-d2 zoo pair`: paired tests of rows against their baselines, from the results of the runs."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Mapping, Sequence
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
    comparisons,
    keep_test,
    kept_test,
    path_of,
    read_plan,
    recorded_in,
)


def pair(args: argparse.Namespace) -> None:
    """Test each chosen row of which more seeds are there than are in its test."""
    plan = read_plan(args.plan, args.records)
    for comparison in chosen(plan, args.only):
        tested = kept_test(plan, comparison) or {"seeds": []}
        if len(tested["seeds"]) == len(comparison.pairs(plan)) > 0:
            continue
        try:
            folders = folders_of(plan, comparison, args.output)
            if len(folders) > len(tested["seeds"]):
                print(pair_row(plan, comparison, folders, args.draws), flush=True)
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


def folders_of(plan: Plan, comparison: Comparison, output: Path) -> dict[int, tuple[Path, Path]]:
    """Seed -> the folders of its runs, of those that are both under `output`.

    Raises InputError: there is no such seed; names the first run that is missing.
    """
    pairs = comparison.pairs(plan)
    if not pairs:
        raise InputError("no seed has a record of it and of its baseline.")
    folders = {
        seed: tuple(recorded_in(plan, run, output) for run in runs) for seed, runs in pairs.items()
    }
    there = {seed: both for seed, both in folders.items() if None not in both}
    if not there:
        seed = min(folders)
        run = pairs[seed][folders[seed].index(None)]
        raise InputError(f"the run that {path_of(plan, run)} is of is not under {output}.")
    return there


def pair_row(
    plan: Plan, comparison: Comparison, folders: Mapping[int, tuple[Path, Path]], draws: int
) -> str:
    """Keep the test of a row, and put it into words. `folders`: see `folders_of`.

    Raises InputError: a run holds no results, or those of other images or objects.
    """
    drawn = [[drawn_of(folder, draws) for folder in both] for both in folders.values()]
    truth = drawn[0][0].truth
    for both in drawn:
        if not all(same_truth(truth, one.truth) for one in both):
            raise InputError("its runs were evaluated on different images or objects.")
    differences = paired_test([tuple(one.metrics for one in both) for both in drawn])
    about = {"seeds": list(folders), "images": len(truth["images"]), "draws": draws}
    figures = {metric: as_figures(one) for metric, one in differences.items()}
    keep_test(plan, comparison, {**about, **figures})
    ap = differences["AP"]
    return (
        f"{comparison.name}, seeds {', '.join(map(str, folders))}: AP {ap.value:+.1f} over "
        f"{comparison.baseline}, {ap.low:+.1f} to {ap.high:+.1f} over the images."
    )


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
