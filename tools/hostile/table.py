"""The table of docs/ROBUSTNESS.md, from the results of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tabulate import tabulate

BEGIN, END = "<!-- table of `make hostile` -->", "<!-- end of the table -->"
HEADERS = ("surface", "what is checked", "tries", "read", "refused", "failed", "seconds", "command")


def write_tables(report: dict) -> str:
    """Markdown: one row a surface."""
    from .surfaces import surface

    rows = []
    for name, row in report["surfaces"].items():
        failed = sum(failure["count"] for failure in row["failures"].values())
        read = row["tries"] - row["refused"] - failed
        command = f"`python -m hostile --only {name} --seed {row['seed']}`"
        what = surface(name).what
        rows.append(
            (name, what, row["tries"], read, row["refused"], failed, row["seconds"], command)
        )
    tries = sum(row["tries"] for row in report["surfaces"].values())
    head = f"{tries:,} tries in {report['seconds']} seconds; {report['machine']}.\n\n"
    return head + tabulate(rows, HEADERS, "pipe", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of `make hostile`")
    parser.add_argument("page", type=Path, help="docs/ROBUSTNESS.md, whose table is replaced")
    args = parser.parse_args()
    page = args.page.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    table = write_tables(json.loads(args.results.read_text()))
    args.page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
