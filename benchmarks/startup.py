"""How long each command takes to say what it takes, and to load what does its work.

    python benchmarks/startup.py [--rounds N] [COMMAND ...]

Each is a process of its own: seconds of `iou-d2 COMMAND --help`, of a wrong argument, and of
importing what runs after the arguments are parsed. The least of the rounds, which take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

from iou_d2.commands.main import COMMANDS, module_name


def seconds_of(*arguments: str) -> float:
    root = Path(__file__).resolve().parent.parent
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=root, env=os.environ, capture_output=True)
    return time.perf_counter() - start


def runs_of(command: str) -> list[list[str]]:
    """The arguments of Python for each column of the table."""
    if not command:
        return [["-m", "iou_d2", "--help"], ["-m", "iou_d2", "no-such-command"]]
    loading = f"import iou_d2.commands.{module_name(command)}"
    line = ["-m", "iou_d2", command]
    return [[*line, "--help"], [*line, "--no-such-option"], ["-c", loading]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commands", nargs="*", default=["", *COMMANDS], metavar="COMMAND")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores; Python itself starts in", end=" "
    )
    print(f"{min(seconds_of('-c', '') for _ in range(args.rounds)):.2f} s.")
    runs = {command: runs_of(command) for command in args.commands}
    times = {command: [float("inf")] * len(lines) for command, lines in runs.items()}
    for _ in range(args.rounds):
        for command, lines in runs.items():
            times[command] = [min(t, seconds_of(*x)) for t, x in zip(times[command], lines)]
    rows = [[f"iou-d2 {name}".strip(), *(f"{t:.2f}" for t in row)] for name, row in times.items()]
    headers = ["seconds of", "--help", "a wrong argument", "loading what works"]
    print(tabulate(rows, headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
