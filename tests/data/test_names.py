"""Names of datasets whose parts are short, or look like a drive of Windows."""

from __future__ import annotations

import os

import pytest

from iou_d2.data.register import register_dataset, split_with_drives
from iou_d2.errors import InputError


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r"C:\data\a.json", [r"C:\data\a.json"]),
        (r"C:\data\a.json:D:\images", [r"C:\data\a.json", r"D:\images"]),
        ("C:/data/a.json:d:/images", ["C:/data/a.json", "d:/images"]),
        ("f:train", ["f", "train"]),
        (r"C:\f:train", [r"C:\f", "train"]),
        (r"a.json:i", ["a.json", "i"]),
        (r"sets\a.json:images", [r"sets\a.json", "images"]),
    ],
)
def test_the_colon_of_a_drive_divides_nothing(text, parts):
    assert split_with_drives(text) == parts


@pytest.mark.skipif(os.name == "nt", reason="there it is a path")
@pytest.mark.parametrize("name", [r"coco:C:\a.json", "coco:C:/a.json", r"voc:sets:D:\x"])
def test_a_windows_path_elsewhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="holds a Windows path"):
        register_dataset(name, "clean")


def test_a_folder_of_one_letter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path / 'f'}"):
        register_dataset("voc:f:train", "clean")
