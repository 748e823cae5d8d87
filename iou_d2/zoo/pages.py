"""Pages with tables of runs. Pure functions: plan and records in, Markdown out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from tabulate import tabulate

from iou_d2.errors import InputError

from .paired import Comparison, comparisons, kept_test
from .plan import BASE, MODEL, Dataset, Plan, Row, Table
from .records import kept, path_of

CORRELATION = "localization/pearson_confidence"
HEAD = """# Model zoo

Written by `iou-d2 zoo write` from the records in `docs/runs`; `make zoo DATA=...` trains what has
no record yet. DATA is the folder of the sets, as docs/runs/zoo.yaml has them. Figures are means
over the seeds, ± their standard deviation; r is Pearson's correlation of the score with the true
IoU; minutes are of one run, start and evaluation included, which may have shared its machine with
others. Rows of several tables may be of the same runs. A gain is over the run of the same seed.
"95 % over images" is of the paired bootstrap of `iou-d2 zoo pair`: the test images are drawn anew,
the same ones for a row and its baseline and for all seeds, and the mean gain is counted on each
draw; it says how many seeds are in it, where not all are. Where the runs of a table were made on
several devices, a column names those of each row."""
_MARKED = re.compile(r"(<!-- runs: (?P<table>\S+) -->\n).*?(<!-- end of runs -->)", re.DOTALL)


def with_tables(page: str, plan: Plan) -> str:
    """`page` with each table anew that stands between `<!-- runs: TABLE -->` and
    `<!-- end of runs -->`.

    Raises InputError: the plan has no such table.
    """

    def anew(match: re.Match) -> str:
        if match["table"] not in plan.tables:
            raise InputError(f"{plan.path} has no table {match['table']}, which a page names.")
        return f"{match[1]}{tables_of(match['table'], plan)}\n{match[3]}"

    return _MARKED.sub(anew, page)


def tables_of(name: str, plan: Plan) -> str:
    """A table for each set, of the rows that have a record. Where a row has a baseline there are
    its gain in AP and, once tests are kept, the interval of that over the test images; where not
    all are of one device, a last column says of which."""
    table = plan.tables[name]
    compared = {(one.dataset, one.row): one for one in comparisons(plan) if one.table == name}
    tests = {key: test for key, one in compared.items() if (test := kept_test(plan, one))}
    names_devices = len(devices_of(records_of(name, plan))) > 1
    headers = [*table.metrics, "r", "minutes"]
    headers += ["gain in AP"] if compared else []
    headers += ["95 % over images"] if tests else []
    headers += ["device"] if names_devices else []
    parts = []
    for dataset in table.sets:
        rows = []
        for row, about in table.rows.items():
            runs = [plan.run(name, dataset, row, seed) for seed in table.seeds]
            records = [record for run in runs if (record := kept(plan, run)) is not None]
            if not records:
                continue
            cells = [about.name, *figures(records, table.metrics)]
            cells += [gain(plan, compared.get((dataset, row)))] if compared else []
            cells += [interval(tests.get((dataset, row)), len(records))] if tests else []
            cells += ["; ".join(devices_of(records))] if names_devices else []
            rows.append(cells)
        if rows:
            names = [dataset.replace("_", " "), *headers]
            parts.append(tabulate(rows, names, "github", disable_numparse=True))
    return "\n\n".join(parts) if parts else "No run of this table has a record yet."


def gain(plan: Plan, comparison: Comparison | None) -> str:
    """By how much the AP of a row is over that of its baseline with the same seed: the mean and the
    standard deviation over the seeds that both have, and which row that is, where it is not the
    table's. Empty without a baseline, a dash where one has no AP."""
    if comparison is None:
        return ""
    gains = list(comparison.gains(plan).values())
    if not gains or None in gains:
        return "-"
    text = spread(gains, 1, "+")
    table = plan.tables[comparison.table]
    if comparison.baseline == table.baseline:
        return text
    return f"{text} over {table.rows[comparison.baseline].name}"


def interval(test: Mapping | None, seeds: int) -> str:
    """The middle 95 % of the gain over draws of the test images, and of how many of the seeds it
    is, where not of all; empty without a test."""
    if test is None:
        return ""
    text = f"{test['AP']['low']:+.1f} to {test['AP']['high']:+.1f}"
    tested = len(test["seeds"])
    return text if tested == seeds else f"{text} ({tested} of {seeds} seeds)"


def records_of(name: str, plan: Plan) -> list[dict]:
    """Those of the runs of a table."""
    runs = [run for run in plan.runs() if run.table == name]
    return [record for run in runs if (record := kept(plan, run)) is not None]


def devices_of(records: Sequence[Mapping]) -> list[str]:
    return sorted({device for record in records for device in record["devices"]})


def figures(records: Sequence[Mapping], metrics: Sequence[str]) -> list[str]:
    """Of the runs of one row, which differ by their seed: the mean, and with more than one seed
    the standard deviation over them. Minutes of several devices have no mean: a dash."""
    results = [record["results"] for record in records]
    cells = [spread([one.get(f"bbox/{name}") for one in results], 1) for name in metrics]
    cells.append(spread([one.get(CORRELATION) for one in results], 3))
    minutes = [record["seconds"] / 60 for record in records]
    return [*cells, spread(minutes, 1) if len(devices_of(records)) == 1 else "-"]


def spread(values: Sequence[float | None], digits: int, sign: str = "") -> str:
    """The mean, with "± standard deviation" of more than one value; a dash where one is missing.
    With the sign "+" the mean has one, above 0 too."""
    if any(value is None for value in values):
        return "-"
    text = f"{mean(values):{sign}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def model_zoo(plan: Plan) -> str:
    """The page of all runs with a record, each with its seeds, its command and its figures; a table
    without any record is a line at the end."""
    parts, waiting = [HEAD], []
    for name, table in plan.tables.items():
        runs = [run for run in plan.runs() if run.table == name]
        if not any(path_of(plan, run).is_file() for run in runs):
            waiting.append(f"- {table.title}: {len(runs)} runs, `--only '{name}/*'`")
            continue
        parts += [f"## {table.title}", _about(name, plan)]
        parts += [tables_of(name, plan), *_commands(name, plan)]
    if waiting:
        parts += ["## Not trained yet", "\n".join(waiting)]
    return "\n\n".join(parts) + "\n"


def _about(name: str, plan: Plan) -> str:
    """On what the runs of a table ran."""
    runs = [run for run in plan.runs() if run.table == name]
    records = records_of(name, plan)
    torch = sorted({record["versions"]["torch"].split("+")[0] for record in records})
    seeds = ", ".join(map(str, plan.tables[name].seeds))
    on = f"; {'; '.join(devices_of(records))}; torch {', '.join(torch)}" if records else ""
    return f"{len(records)} of {len(runs)} runs have a record. Seeds: {seeds}{on}."


def _commands(name: str, plan: Plan) -> list[str]:
    """What is typed for each run: what the rows share, what differs, what each set adds."""
    table = plan.tables[name]
    gpus = {"0" if x.startswith("cpu") else "1" for x in devices_of(records_of(name, plan))}
    num_gpus = gpus.pop() if len(gpus) == 1 else "0-OR-1"
    train = f"    iou-d2 train --num-gpus {num_gpus} --config CONFIG SET SEED N "
    train += _pairs(table.overrides)
    trained = {key: row for key, row in table.rows.items() if not row.evaluates}
    evaluated = [row for row in table.rows.values() if row.evaluates]
    rows = [[row.name, f"`{row.config}`", _code(_own(row, table))] for row in trained.values()]
    sets = [
        [dataset.replace("_", " "), f"`{_of_set(plan.sets[dataset])}`"]
        for dataset in table.sets
        if plan.sets[dataset].train
    ]
    told = [f"{train.rstrip()} ...", tabulate(rows, ["row", "CONFIG", "..."], "github")]
    if evaluated:
        command = f"    iou-d2 eval --num-gpus {num_gpus} --config {BASE}/config.yaml "
        told.append(f"{command}MODEL.WEIGHTS {BASE}/{MODEL} ...")
        names = {row.name: table.rows[row.evaluates].name for row in evaluated}
        rows = [[row.name, names[row.name], _code(_pairs(row.overrides))] for row in evaluated]
        told.append(tabulate(rows, ["row", f"{BASE}: output of", "..."], "github"))
    return [*told, tabulate(sets, ["set", "SET"], "github")] if sets else told


def _own(row: Row, table: Table) -> str:
    """What a training adds to that of its table."""
    own = _pairs(row.overrides)
    if not row.starts_from:
        return own
    base = table.rows[row.starts_from].name
    return f"MODEL.WEIGHTS '(output of {base})/{MODEL}' {own}".rstrip()


def _code(words: str) -> str:
    return f"`{words}`" if words else ""


def _of_set(dataset: Dataset) -> str:
    options = [("--train", dataset.train), ("--test", dataset.test)]
    words = [word for option, value in options if value for word in (option, value)]
    return " ".join([shlex.join(words), _pairs(dataset.overrides)]).strip()


def _pairs(overrides: Mapping[str, str]) -> str:
    return shlex.join([word for pair in overrides.items() for word in pair])
