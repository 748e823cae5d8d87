"""How a generated set is written, and what survives where that fails."""

from __future__ import annotations

import os
import resource
import runpy
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import cv2
import pytest

from forks import FORKS
from iou_d2.data import shapes
from iou_d2.data.shapes import ShapesSpec, write_shapes
from shapes_files import digests

# pycocotools with NumPy 2, for every mask it decodes.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_same_bytes_for_any_number_of_threads(tmp_path, monkeypatch):
    spec = ShapesSpec("val", 70, 64, seed=9)  # more than one chunk
    write_shapes(spec, tmp_path / "two")
    monkeypatch.setattr(shapes, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    write_shapes(spec, tmp_path / "one")
    monkeypatch.setattr(shapes, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(5))
    write_shapes(spec, tmp_path / "five")
    assert len(digests(tmp_path / "two")) == 71
    assert digests(tmp_path / "two") == digests(tmp_path / "one") == digests(tmp_path / "five")


def test_finished_set_is_not_made_again(tmp_path):
    spec = ShapesSpec("train", 2, 64)
    write_shapes(spec, tmp_path / "set")
    before = (tmp_path / "set" / "instances.json").stat().st_mtime_ns
    write_shapes(spec, tmp_path / "set")
    assert (tmp_path / "set" / "instances.json").stat().st_mtime_ns == before
    write_shapes(ShapesSpec("train", 2, 64, seed=1), tmp_path / "set")
    assert (tmp_path / "set" / "instances.json").stat().st_mtime_ns != before


def start_writer(folder: Path, images: int) -> BaseProcess:
    """Write a set in another process. It shares no lock with this one, such as that of tqdm, which
    a killed process never gives back."""
    process = FORKS.Process(target=write_shapes, args=(ShapesSpec("train", images, 64), folder))
    process.start()
    return process


def test_killed_half_way_then_two_at_once(tmp_path):
    """A killed writer leaves no set; two later ones find it whole, as one alone makes it."""
    folder = tmp_path / "set"
    writer = start_writer(folder, 100_000)
    unfinished = tmp_path / "set.partial" / "images"
    deadline = time.monotonic() + 60
    while not (unfinished.is_dir() and len(os.listdir(unfinished)) > 20):
        assert writer.is_alive() and time.monotonic() < deadline, "no image was written"
        time.sleep(0.05)
    writer.kill()
    writer.join()
    assert not folder.exists() and unfinished.is_dir()

    writers = [start_writer(folder, 150) for _ in range(2)]
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    write_shapes(ShapesSpec("train", 150, 64), tmp_path / "alone")
    assert digests(folder) == digests(tmp_path / "alone")
    assert not unfinished.exists()


def test_incomplete_folder_is_made_anew(tmp_path):
    spec = ShapesSpec("train", 2, 64)
    write_shapes(spec, tmp_path / "whole")
    write_shapes(spec, tmp_path / "set")
    expected = digests(tmp_path / "whole")
    for damage in (b"", b'{"info": {"desc', b"\xff\xfe", None):
        path = tmp_path / "set" / "instances.json"
        path.unlink() if damage is None else path.write_bytes(damage)
        write_shapes(spec, tmp_path / "set")
        assert digests(tmp_path / "set") == expected


def test_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "root").write_text("a file in place of a folder")
    for folder in (tmp_path / "root" / "set", tmp_path / "root"):
        with pytest.raises(OSError, match=f"Cannot write the shapes dataset to {folder} "):
            write_shapes(ShapesSpec("train", 2, 64), folder)
    assert (tmp_path / "root").is_file() and not (tmp_path / "root.partial").exists()


def test_full_disk_is_told_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # less than one image
        with pytest.raises(OSError, match="Cannot write the shapes dataset to .*has room"):
            write_shapes(ShapesSpec("train", 4, 128), tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["set.lock"]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    """At no time do more records wait than those of one chunk."""
    made, waiting = [], []
    make_one, write_records = shapes._make_one, shapes._write_records

    def counted_make_one(*args):
        made.append(1)
        return make_one(*args)

    def watched(file, records):
        def watch():
            for record in records:
                if "image_id" in record:
                    waiting.append(len(made) - record["image_id"])
                yield record

        write_records(file, watch())

    monkeypatch.setattr(shapes, "_make_one", counted_make_one)
    monkeypatch.setattr(shapes, "_write_records", watched)
    write_shapes(ShapesSpec("train", 300, 64), tmp_path / "set")
    assert len(made) == 300 and max(waiting) <= shapes._CHUNK


def test_command_makes_a_set_and_a_contact_sheet(tmp_path, monkeypatch, capsys):
    tool = str(Path(__file__).parents[2] / "tools" / "make_shapes.py")
    sheet = tmp_path / "sheet.png"
    options = ["--images", "4", "--pixels", "64", "--out", str(tmp_path / "set")]
    monkeypatch.setattr(sys, "argv", [tool, *options, "--contact-sheet", str(sheet)])
    runpy.run_path(tool, run_name="__main__")
    assert len(digests(tmp_path / "set")) == 5 and cv2.imread(str(sheet)).any()
    with pytest.raises(SystemExit):
        runpy.run_path(tool, run_name="__main__")
    assert "takes a new or an empty folder" in capsys.readouterr().err
