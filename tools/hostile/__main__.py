"""python -m hostile: run all surfaces and write the results, or repeat one try.

python -m hostile                                       all, as `make hostile`
python -m hostile --only coco voc --tries 100 --seed 7  a part
python -m hostile --only coco --seed 0 --try 17         one try, with its traceback
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hostile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="SURFACE", help="all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, help="of each surface; its own number if left out")
    parser.add_argument("--try", type=int, dest="number", metavar="K", help="repeat this one alone")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=Path("output/hostile"))
    return parser.parse_args()


def parts(names: list[str], args: argparse.Namespace, failures: Path) -> list[tuple]:
    """The longest surfaces come first, so that no process is left with one at the end."""
    from .surfaces import surface

    tasks = []
    for name in names:
        one = surface(name)
        tries = args.tries or one.tries
        step = -(-tries // one.chunks)
        tasks += [
            (name, args.seed, first, min(first + step, tries), failures)
            for first in range(0, tries, step)
        ]
    return tasks


def merged(counts: list) -> dict[str, dict]:
    """The counts of all parts of a surface together, by its name."""
    rows: dict[str, dict] = {}
    for count in counts:
        row = rows.setdefault(
            count.surface,
            {"seed": count.seed, "tries": 0, "refused": 0, "seconds": 0.0, "failures": {}},
        )
        row["tries"] += count.tries
        row["refused"] += count.refused
        row["seconds"] = round(row["seconds"] + count.seconds, 1)
        for kind, number in count.failures.items():
            failure = row["failures"].setdefault(kind, {"count": 0, "tries": []})
            failure["count"] += number
            failure["tries"] += count.examples[kind]
    return rows


def repeat(name: str, seed: int, number: int, output: Path) -> int:
    """Judge one try as in a whole run, and print what is wrong."""
    from .runner import run
    from .surfaces import surface

    count = run(surface(name), seed, number, number + 1, output / "failures")
    for kind in count.failures:
        print((output / "failures" / f"{name}-{seed}-{number}" / "FAILURE.txt").read_text())
        print(kind)
    print("failed" if count.failures else "refused" if count.refused else "read")
    return 1 if count.failures else 0


def main() -> int:
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from .surfaces import NAMES, run_part
    from .table import write_tables

    names = args.only or list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        sys.exit(f"There is no surface {', '.join(unknown)}: they are {', '.join(NAMES)}.")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.number is not None:
        return repeat(names[0], args.seed, args.number, args.output.absolute())

    start = time.monotonic()
    tasks = parts(names, args, (args.output / "failures").absolute())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        counts = list(pool.map(run_part, tasks))
    rows = merged(counts)
    report = {
        "machine": f"{args.processes} processes, {platform.machine()}, Python "
        f"{platform.python_version()}",
        "seconds": round(time.monotonic() - start),
        "surfaces": rows,
    }
    path = args.output / "results.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(write_tables(report))
    return 1 if any(row["failures"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
