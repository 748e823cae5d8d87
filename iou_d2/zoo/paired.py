"""Paired tests of rows against their baselines, over the test images, kept beside the records.

One file for each table and set; each of its rows says which records it is of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from iou_d2.data.cleaning import write_text
from iou_d2.errors import InputError

from .plan import Plan, Run
from .records import kept

FILE = "paired.json"
# A difference in AP that is counted from the results lies closer to that of the records, in which
# figures are rounded.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Comparison:
    """A row of a table on one set, beside its baseline."""

    table: str
    dataset: str
    row: str
    baseline: str

    @property
    def name(self) -> str:
        return f"{self.table}/{self.dataset}/{self.row}"

    def pairs(self, plan: Plan) -> dict[int, tuple[Run, Run]]:
        """Seed -> the runs of the baseline and of the row, of those that both have a record."""
        pairs = {}
        for seed in plan.tables[self.table].seeds:
            pair = tuple(
                plan.run(self.table, self.dataset, row, seed) for row in (self.baseline, self.row)
            )
            if all(kept(plan, run) is not None for run in pair):
                pairs[seed] = pair
        return pairs

    def gains(self, plan: Plan) -> dict[int, float | None]:
        """Seed -> AP of the row minus that of its baseline; None where one of them has no AP, as on
        a set without objects."""
        gains = {}
        for seed, pair in self.pairs(plan).items():
            before, ap = (kept(plan, run)["results"]["bbox/AP"] for run in pair)
            gains[seed] = None if ap is None or before is None else ap - before
        return gains


def comparisons(plan: Plan) -> Iterator[Comparison]:
    """Of all rows with a baseline, by table and set."""
    for name, table in plan.tables.items():
        for dataset in table.sets:
            for row in table.rows:
                baseline = table.baseline_of(row)
                if baseline is not None:
                    yield Comparison(name, dataset, row, baseline)


def keep_test(plan: Plan, comparison: Comparison, test: Mapping) -> Path:
    """Keep a test in `plan.records`.

    Args:
        test: "seeds", of which pairs it is; "images" and "draws", how many; "AP", "AP50", "AP75":
            "difference", "low", "high" and "p" of each, see `Difference`.

    Raises InputError: the difference in AP is not that of the records.
    """
    test = {"baseline": comparison.baseline, **test}
    if not _is_of_records(plan, comparison, test):
        raise InputError(
            f"the difference in AP is {test['AP']['difference']:.4f} by the results, but another "
            "one by the records."
        )
    path = plan.records / comparison.table / comparison.dataset / FILE
    tests = _read(path) if path.is_file() else {}
    tests[comparison.row] = test
    write_text(path, json.dumps(tests, indent=1) + "\n")
    return path


def kept_test(plan: Plan, comparison: Comparison) -> dict | None:
    """The test of a row, which may be of some of its seeds; None where there is none yet, or no
    longer one of its records."""
    for folder in (plan.records, plan.path.parent):
        path = folder / comparison.table / comparison.dataset / FILE
        test = _read(path).get(comparison.row) if path.is_file() else None
        if test is not None and _is_of_records(plan, comparison, test):
            return test
    return None


def _read(path: Path) -> dict:
    """Raises InputError: it is no file of tests."""
    try:
        tests = json.loads(path.read_text(encoding="utf-8"))
        for test in tests.values():
            _ = test["baseline"], test["seeds"], test["draws"], test["AP"]["difference"]
            _ = test["AP"]["low"] + test["AP"]["high"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no tests of rows: {error!r}.") from error
    return tests


def _is_of_records(plan: Plan, comparison: Comparison, test: Mapping) -> bool:
    gains = comparison.gains(plan)
    if test["baseline"] != comparison.baseline or not set(test["seeds"]) <= gains.keys():
        return False
    tested = [gains[seed] for seed in test["seeds"]]
    if not tested or None in tested:
        return False
    return math.isclose(test["AP"]["difference"], mean(tested), abs_tol=ROUNDING)
