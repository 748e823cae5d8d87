"""`iou-d2 zoo`: trains the runs behind the documents' tables, and writes those tables."""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from statistics import mean

from iou_d2.commands.parsers.zoo import parse_args
from iou_d2.data.cleaning import write_text
from iou_d2.errors import InputError
from iou_d2.zoo import Plan, Run, keep, kept, model_zoo, read_plan, with_tables

# Of a run of which nothing is known yet, in seconds.
GUESS = 600.0


def train(args: argparse.Namespace) -> None:
    """Train what has no record, run by run; a run that fails is told and passed over."""
    plan = read_plan(args.plan)
    runs = [run for run in chosen(plan, args.only) if kept(plan, run) is None]
    needs_data = [run.name for run in runs if run.train and args.data is None]
    if needs_data:
        raise InputError(f"{needs_data[0]} needs the folder of its images: give it by --data.")
    hours = sum(expected_seconds(plan, run) for run in runs) / 3600
    print(f"{len(runs)} runs to train, about {hours:.1f} hours.", flush=True)
    failed = [run.name for run in runs if not train_one(plan, run, args)]
    if failed:
        raise InputError(f"{len(failed)} runs failed: {', '.join(failed)}.")


def chosen(plan: Plan, patterns: Sequence[str]) -> list[Run]:
    """The runs whose name fits one of the patterns; all without any."""
    runs = [
        run
        for run in plan.runs()
        if not patterns or any(fnmatch.fnmatch(run.name, pattern) for pattern in patterns)
    ]
    if not runs:
        raise InputError(f"No run of {plan.path} is called {' or '.join(patterns)}.")
    return runs


def expected_seconds(plan: Plan, run: Run) -> float:
    """What other runs of the row took, else those of its table, else a guess."""
    others = [other for other in plan.runs() if other.table == run.table]
    of_row = [other for other in others if (other.dataset, other.row) == (run.dataset, run.row)]
    for group in (of_row, others):
        seconds = [record["seconds"] for other in group if (record := kept(plan, other))]
        if seconds:
            return mean(seconds)
    return GUESS


def train_one(plan: Plan, run: Run, args: argparse.Namespace) -> bool:
    folder = args.output / run.name
    arguments = run.arguments(str(args.data), str(folder))
    arguments += ["DATALOADER.NUM_WORKERS", "0"] if args.threads == 1 else []
    # After a stop the run goes on from its last checkpoint; without one it starts anew.
    arguments.insert(1, "--resume")
    print(f"{run.name}: iou-d2 {shlex.join(arguments)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
    with (folder / "output.txt").open("w") as output:
        status = subprocess.run(
            [sys.executable, "-m", "iou_d2", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads},
        ).returncode
    if status != 0:
        print(f"{run.name} failed; {folder / 'output.txt'} says why.", flush=True)
        return False
    print(f"{run.name} is kept in {keep(plan, run, folder)}.", flush=True)
    return True


def write(args: argparse.Namespace) -> None:
    plan = read_plan(args.plan)
    for page in args.pages:
        if not page.is_file():
            raise InputError(f"There is no page {page}; --pages names those with tables.")
        write_text(page, with_tables(page.read_text(encoding="utf-8"), plan))
    write_text(args.model_zoo, model_zoo(plan))
    print(f"Wrote {', '.join(map(str, [*args.pages, args.model_zoo]))}.")


def keep_run(args: argparse.Namespace) -> None:
    plan = read_plan(args.plan)
    runs = {run.name: run for run in plan.runs()}
    if args.name not in runs:
        raise InputError(f"{plan.path} has no run {args.name}.")
    print(f"Kept in {keep(plan, runs[args.name], args.run)}.")


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    {"train": train, "write": write, "keep": keep_run}[args.part](args)
