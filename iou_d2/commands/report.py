"""`iou-d2 report`: one page on finished runs or result files. Neither torch nor Detectron2 is
needed for files alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from iou_d2.analysis.reading import read_ground_truth, read_results, require_annotations
from iou_d2.commands.output import check_output_file, write_whole
from iou_d2.commands.parsers.report import parse_args
from iou_d2.dependencies import missing_dependency
from iou_d2.errors import InputError
from iou_d2.report import Subject, check_dataset, measure, write_dataset, write_page

_RESULTS = "coco_instances_results"


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


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    check_output_file(args.output)
    if args.fiftyone:
        check_dataset(args.fiftyone)
    names = args.names or names_of(args.runs or [Path(path) for path in args.results])
    subjects_of = subjects_of_runs if args.runs else subjects_of_files
    subjects = subjects_of(args, names, args.command)
    measures = [measure(subject) for subject in subjects]
    page = write_page(subjects, ", ".join(names), args.pictures, args.draws, measures)
    write_whole(args.output, page)
    print(f"The report is in {args.output} ({len(page.encode()) / 1e6:.1f} MB).")
    if args.fiftyone:
        write_dataset(subjects, measures, args.fiftyone)
        print(f"FiftyOne has the dataset: `fiftyone app launch {args.fiftyone}`.")
