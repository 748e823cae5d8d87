from __future__ import annotations

import json

import pytest

import pooling_figure

ALIGN = "RoIAlign, adaptive"
WANTED = {
    "RoI pooling (max)": "steps",
    "RoIAlign, 1x1 samples": "kinks",
    "RoIAlign, 2x2 samples": "kinks",
    ALIGN: "kinks",
    "PrRoI pooling": "smooth",
    "SPP (max)": "steps",
    "PrRoISPP": "smooth",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figure")
    picture, curves = folder / "a.png", folder / "a.json"
    pooling_figure.main(["--png", str(picture), "--json", str(curves)])
    assert picture.stat().st_size < 100_000
    return json.loads(curves.read_text())


def test_kinds_are_told_apart(written):
    assert {name: curve["kind"] for name, curve in written["shift"].items()} == WANTED
    # The number of samples changes with the size.
    expected = {**WANTED, ALIGN: "steps"}
    assert {name: curve["kind"] for name, curve in written["edge"].items()} == expected


def test_a_maximum_is_a_pixel_of_the_map(written):
    pixels = pooling_figure.random_map().flatten().numpy().round(6)
    for motion in written.values():
        for name in ("RoI pooling (max)", "SPP (max)"):
            assert {y for values in motion[name]["y"] for y in values} <= set(pixels.tolist())
