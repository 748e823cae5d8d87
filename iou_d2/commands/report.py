"""Write one page on finished runs, or on result files of any detector.

    iou-d2 report output/x output/y --output report.html
    iou-d2 report --gt instances.json --results coco_instances_results.json --images images

The page is one file that opens without a network: metrics, losses, curves, errors by type,
confusion, calibration, and pictures of the best and the worst images. Several runs, or several
--results, stand side by side. With --gt neither torch nor Detectron2 is needed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from iou_d2.analysis.reading import read_ground_truth, read_results, require_annotations
from iou_d2.commands.output import check_output_file, write_whole
from iou_d2.dependencies import missing_dependency
from iou_d2.errors import InputError, MissingFileError
from iou_d2.report import Subject, write_page

_RESULTS = "coco_instances_results"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="OUTPUT_DIR of a run")
    parser.add_argument("--gt", help="ground truth, a COCO JSON")
    parser.add_argument("--results", nargs="+", default=[], help="COCO results, one or several")
    parser.add_argument("--images", type=Path, help="folder of the images of --gt")
    parser.add_argument("--names", nargs="+", help="how the page calls each run or results file")
    parser.add_argument("--output", default="report.html", help="the file; report.html if unset")
    parser.add_argument("--max-dets", type=int, help="detections an image and class; 100 if unset")
    parser.add_argument("--pictures", type=int, default=20, help="images a list; 20 if unset")
    parser.add_argument("--draws", type=int, default=1000, help="of the paired bootstrap")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    if bool(args.runs) == bool(args.gt or args.results):
        raise InputError("Give either finished runs, or --gt with --results.")
    if bool(args.gt) != bool(args.results):
        raise InputError("--gt and --results go together.")
    if args.runs and (args.images or args.max_dets is not None):
        raise InputError("--images and --max-dets go with --gt: a run knows its own.")
    if args.images and not args.images.is_dir():
        raise MissingFileError(f"There is no folder {args.images}.")
    for name, least in (("max_dets", 1), ("pictures", 0), ("draws", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} is at least {least}, but it is {value}.")
    number = len(args.runs) or len(args.results)
    if args.names and len(args.names) != number:
        raise InputError(f"--names has {len(args.names)} names for {number} results.")


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names that tell the paths apart; the paths themselves where none do."""
    names = [_short_name(path.resolve()) for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _short_name(path: Path) -> str:
    """The folder of a run, also from a results file in it; any other file's own name."""
    if path.stem != _RESULTS:
        return path.name if path.is_dir() else path.stem
    return next((p.name for p in path.parents if p.name and p.name != "inference"), path.stem)


def subjects_of_files(
    args: argparse.Namespace, names: Sequence[str], command: str
) -> list[Subject]:
    truth = read_ground_truth(args.gt)
    require_annotations(args.gt, truth)
    notes = [] if args.images else ["No folder of images was given: boxes stand on empty frames."]
    return [
        Subject(
            name=name,
            truth=truth,
            results=read_results(path, truth),
            images=args.images,
            facts={"ground truth": str(args.gt), "results": str(path)},
            commands=[command],
            max_dets=args.max_dets or 100,
            notes=notes,
        )
        for path, name in zip(args.results, names)
    ]


def subjects_of_runs(args: argparse.Namespace, names: Sequence[str], command: str) -> list[Subject]:
    missing = missing_dependency()
    if missing:
        raise InputError(f"{missing} Result files alone are read without it: see --gt.")
    from iou_d2.commands.report_runs import subject_of_run

    return [subject_of_run(run, name, command) for run, name in zip(args.runs, names)]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    check(args)
    check_output_file(args.output)
    names = args.names or names_of(args.runs or [Path(path) for path in args.results])
    subjects_of = subjects_of_runs if args.runs else subjects_of_files
    subjects = subjects_of(args, names, shlex.join(["iou-d2", "report", *argv]))
    page = write_page(subjects, ", ".join(names), args.pictures, args.draws)
    write_whole(args.output, page)
    print(f"The report is in {args.output} ({len(page.encode()) / 1e6:.1f} MB).")


if __name__ == "__main__":
    main()
