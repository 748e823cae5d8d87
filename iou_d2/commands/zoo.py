"""`iou-d2 zoo`: trains the runs behind the documents' tables, tests them, and writes the tables."""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from threading import Event

import torch

from iou_d2.commands.paired_runs import pair
from iou_d2.commands.parsers.zoo import parse_args
from iou_d2.data.cleaning import write_text
from iou_d2.errors import InputError
from iou_d2.zoo import (
    Plan,
    Run,
    agrees,
    keep,
    kept,
    model_zoo,
    path_of,
    read_plan,
    trained_in,
    with_tables,
)

# Of a run of which nothing is known yet, in seconds.
GUESS = 600.0
# Seconds between looks at a training, and those that it has to end by itself after a stop.
LOOK, GRACE = 0.2, 10.0


def train(args: argparse.Namespace) -> None:
    """Train what has no record, `args.jobs` at a time; a run that fails is told and passed over."""
    if args.gpus and not torch.cuda.is_available():
        raise InputError("--gpus 1 needs CUDA, which is not available: give --gpus 0.")
    plan = read_plan(args.plan, args.records)
    runs = untrained(plan, chosen(plan, args.only), args.output)
    needs_data = [run.name for run in runs if run.train and args.data is None]
    if needs_data:
        raise InputError(f"{needs_data[0]} needs the folder of its images: give it by --data.")
    hours = sum(expected_seconds(plan, run) for run in runs) / 3600 / args.jobs
    beside = f" with {args.jobs} at a time" if args.jobs > 1 else ""
    say(f"{len(runs)} runs to train, about {hours:.1f} hours{beside}.")
    try:
        failed = train_all(plan, runs, args)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from the last checkpoints.")
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


def untrained(plan: Plan, runs: Sequence[Run], output: Path) -> list[Run]:
    """Those without a record, of some that train the same the first, and before them those that
    they go on from, where no model of these is under `output`."""
    first: dict[tuple, Run] = {}
    for run in runs:
        if kept(plan, run) is None:
            first.setdefault(run.training, run)
    for run in list(first.values()):
        while run.base is not None and trained_in(plan, run.base, output) is None:
            run = run.base
            first.setdefault(run.training, run)
    return sorted(first.values(), key=lambda run: run.depth)


def expected_seconds(plan: Plan, run: Run) -> float:
    """What other runs of the row took, else those of its table, else a guess."""
    others = [other for other in plan.runs() if other.table == run.table]
    of_row = [other for other in others if (other.dataset, other.row) == (run.dataset, run.row)]
    for group in (of_row, others):
        seconds = [record["seconds"] for other in group if (record := kept(plan, other))]
        if seconds:
            return mean(seconds)
    return GUESS


def train_all(plan: Plan, runs: Sequence[Run], args: argparse.Namespace) -> list[str]:
    """Train `args.jobs` of the runs at a time, in their order.

    An interrupt ends those under way and starts no more.

    Returns:
        Names of the runs that failed.
    """
    stop = Event()
    with ThreadPoolExecutor(args.jobs) as pool:
        done: dict[tuple, Future] = {}
        for run in runs:  # a run comes after those that it goes on from
            before = run.base and done.get(run.base.training)
            done[run.training] = pool.submit(train_after, before, plan, run, args, stop)
        try:
            return [run.name for run in runs if not done[run.training].result()]
        finally:  # after an error nobody waits for the rest
            stop.set()
            for future in done.values():
                future.cancel()


def train_after(
    before: Future | None, plan: Plan, run: Run, args: argparse.Namespace, stop: Event
) -> bool:
    """`train_one`, once the run that this one goes on from has ended well, from its recorded
    model."""
    if before is not None and not before.result():
        say(f"{run.name} is left out: {run.base.name}, from which it goes on, has not ended well.")
        return False
    folder = run.base and trained_in(plan, run.base, args.output)
    if folder and not agrees(plan, run.base, folder):
        say(
            f"{run.name} is left out: {folder} holds another model than the one that "
            f"{path_of(plan, run.base)} is of, as one from another processor is. Delete that "
            "record, and those of the runs that go on from it, to train all anew."
        )
        return False
    return train_one(plan, run, args, stop)


def train_one(plan: Plan, run: Run, args: argparse.Namespace, stop: Event) -> bool:
    """Train a run, or evaluate, in a process of its own and keep its record; False where it fails,
    or where `stop`, which ends it, is set."""
    if stop.is_set():
        return False
    folder = args.output / run.name
    base = {} if run.base is None else {"base": str(trained_in(plan, run.base, args.output))}
    arguments = run.arguments(str(args.data), str(folder), args.gpus, **base)
    arguments += ["DATALOADER.NUM_WORKERS", "0"] if args.threads == 1 else []
    if not run.is_evaluation:
        # After a stop the run goes on from its last checkpoint; without one it starts anew.
        arguments.insert(1, "--resume")
    say(f"{run.name}: iou-d2 {shlex.join(arguments)}")
    status = train_apart(arguments, args.threads, folder / "output.txt", stop)
    if stop.is_set() and status != 0:
        say(f"{run.name} is stopped.")
        return False
    if status != 0:
        say(f"{run.name} failed; {folder / 'output.txt'} says why.")
        return False
    if kept(plan, run) is not None:
        say(f"{run.name} has a record already.")
        return True
    try:
        say(f"{run.name} is kept in {keep(plan, run, folder)}.")
    except InputError as error:
        say(f"{run.name} is not kept: {error}")
        return False
    return True


def train_apart(arguments: Sequence[str], threads: int, printed: Path, stop: Event) -> int:
    """The exit status of `iou-d2 ARGUMENTS` in a process of its own.

    Once `stop` is set the process has some seconds to end by itself, since a Ctrl-C reaches it too,
    and is killed then.

    Args:
        threads: of the process; 0 for what the machine has.
        printed: file for what it prints.
    """
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    printed.parent.mkdir(parents=True, exist_ok=True)
    with printed.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "iou_d2", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    while process.poll() is None and not stop.wait(LOOK):
        pass
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def say(line: str) -> None:
    """Print a line in one piece: several trainings end at once."""
    print(f"{line}\n", end="", flush=True)


def write(args: argparse.Namespace) -> None:
    plan = read_plan(args.plan, args.records)
    for page in args.pages:
        if not page.is_file():
            raise InputError(f"There is no page {page}; --pages names those with tables.")
        write_text(page, with_tables(page.read_text(encoding="utf-8"), plan))
    write_text(args.model_zoo, model_zoo(plan))
    print(f"Wrote {', '.join(map(str, [*args.pages, args.model_zoo]))}.")


def keep_run(args: argparse.Namespace) -> None:
    plan = read_plan(args.plan, args.records)
    runs = {run.name: run for run in plan.runs()}
    if args.name not in runs:
        raise InputError(f"{plan.path} has no run {args.name}.")
    print(f"Kept in {keep(plan, runs[args.name], args.run)}.")


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    {"train": train, "pair": pair, "write": write, "keep": keep_run}[args.part](args)
