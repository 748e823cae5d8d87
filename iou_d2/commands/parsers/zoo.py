"""Train the runs behind the documents' tables, test them in pairs, and write those tables.

    iou-d2 zoo train --data DATA        # what has no record yet; may be stopped and started again
    iou-d2 zoo train --data DATA --jobs 8 --threads 1    # eight at a time
    iou-d2 zoo pair                     # how far a row's gain hangs on the test images
    iou-d2 zoo write                    # MODEL_ZOO.md, and the tables on the pages
    iou-d2 zoo keep own_data/nuclei/vfnet-seed1 output/x    # a run that was trained by hand

The plan, docs/runs/zoo.yaml in a checkout, names the runs; their records are kept beside it, or in
the folder that --records names and are then looked for in both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from iou_d2.errors import InputError

PAGES = [
    Path("README.md"),
    *(
        Path("docs", f"{name}.md")
        for name in ("RESULTS", "ABLATIONS", "BOX_LOSSES", "POOLING", "TRAINING", "UNITBOX")
    ),
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """`part` of the result is what the command is to do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=Path("docs/runs/zoo.yaml"))
    parser.add_argument("--records", type=Path, metavar="DIR", help="for new records")
    parts = parser.add_subparsers(dest="part", required=True)
    add = parts.add_parser("train", help="train what has no record yet").add_argument
    add("--data", type=Path, help="folder of the sets")
    add("--only", nargs="*", default=[], metavar="PATTERN", help="of names: 'own_data/*/vfnet-*'")
    add("--output", type=Path, default=Path("output/zoo"))
    add("--threads", type=int, default=0, help="of each run; 0: what the machine has")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    add("--gpus", type=int, default=0, choices=(0, 1), help="of each run; 0 is the CPU")
    add = parts.add_parser("pair", help="paired bootstrap of rows and their baselines").add_argument
    add("--only", nargs="*", default=[], metavar="PATTERN", help="of names: 'own_data/*/vfnet'")
    add("--output", type=Path, default=Path("output/zoo"), help="of `iou-d2 zoo train`")
    add("--draws", type=int, default=1000, help="of the test images")
    add = parts.add_parser("write", help="write MODEL_ZOO.md and the tables of pages").add_argument
    add("--pages", nargs="*", type=Path, default=PAGES)
    add("--model-zoo", type=Path, default=Path("MODEL_ZOO.md"))
    add = parts.add_parser("keep", help="keep the record of a finished run").add_argument
    add("name", help="of the run in the plan: TABLE/SET/ROW-seedN")
    add("run", type=Path, metavar="OUTPUT_DIR")
    args = parser.parse_args(argv)
    if args.part == "train" and args.jobs < 1:
        raise InputError(f"--jobs is at least 1, but it is {args.jobs}.")
    if args.part == "pair" and args.draws < 1:
        raise InputError(f"--draws is at least 1, but it is {args.draws}.")
    return args
