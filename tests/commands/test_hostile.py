"""Input that no command can use ends in one line, and bugs are not what it ends in."""

from __future__ import annotations

import itertools
import json
import math

import cv2
import numpy as np
import pytest

from iou_d2.commands import analyze, compare, detect, draw, iou_branch, refine, table
from iou_d2.commands.errors import ending_in_a_sentence

BOX = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20]}
GOOD = {**BOX, "score": 0.9}
TRUTH = {
    "images": [{"id": 1, "file_name": "x.png", "width": 64, "height": 48}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [{**BOX, "id": 1, "area": 400, "iscrowd": 0}],
}
RESULTS = {
    "no file": None,
    "empty": b"",
    "no JSON": b"{",
    "binary": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "an object": {},
    "numbers": [3],
    "nulls": [None],
    "no score": [BOX],
    "score is text": [{**GOOD, "score": "high"}],
    "score is NaN": [{**GOOD, "score": math.nan}],
    "score is infinite": [{**GOOD, "score": math.inf}],
    "score is huge": [{**GOOD, "score": 10**400}],
    "score is null": [{**GOOD, "score": None}],
    "box is text": [{**GOOD, "bbox": "10 10 20 20"}],
    "box of texts": [{**GOOD, "bbox": ["10", "a", "20", "20"]}],
    "box of three": [{**GOOD, "bbox": [1, 2, 3]}],
    "box is NaN": [{**GOOD, "bbox": [1, 2, math.nan, 3]}],
    "box is nested": [{**GOOD, "bbox": [[1], 2, 3, 4]}],
    "unknown image": [{**GOOD, "image_id": 9}],
    "image is a list": [{**GOOD, "image_id": [1]}],
    "unknown class": [{**GOOD, "category_id": 9}],
    "no class": [{key: value for key, value in GOOD.items() if key != "category_id"}],
}
TRUTHS = {
    "no file": None,
    "empty": b"",
    "a list": [],
    "no images": {**TRUTH, "images": None},
    "images by name": {**TRUTH, "images": {"x.png": {}}},
    "image without id": {**TRUTH, "images": [{"file_name": "x.png"}]},
    "image without file": {**TRUTH, "images": [{"id": 1}]},
    "class without name": {**TRUTH, "categories": [{"id": 1}]},
    "annotations by name": {**TRUTH, "annotations": {"1": BOX}},
    "box of three": {**TRUTH, "annotations": [{**BOX, "bbox": [1, 2, 3]}]},
    "object of no image": {**TRUTH, "annotations": [{**BOX, "image_id": 5}]},
}


@pytest.fixture
def folder(tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), np.full((48, 64, 3), 90, dtype=np.uint8))
    write(tmp_path / "gt.json", TRUTH)
    write(tmp_path / "results.json", [GOOD])
    return tmp_path


def write(path, content) -> None:
    path.unlink(missing_ok=True)
    if content is not None:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.write_bytes(text)


def sentence(main, *arguments) -> str:
    """What a command says as it ends with status 1; any other error passes."""
    with pytest.raises(SystemExit) as ended, ending_in_a_sentence():
        main([str(argument) for argument in arguments])
    said = ended.value.code
    assert isinstance(said, str) and said and "\n" not in said
    return said


def files(folder) -> list:
    return ["--gt", folder / "gt.json", "--results", folder / "results.json"]


def arguments_of(main, folder) -> list:
    """The arguments of a command that takes ground truth and results."""
    if main is analyze.main:
        return [*files(folder), "--output", folder / "out"]
    images = [*files(folder), "--images", folder]
    if main is draw.main:
        return [*images, "--output", folder / "out"]
    config = ["--config", "quick/iou_net_standalone_shapes"]
    weights = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", folder / "model.pth"]
    return [*config, *images, "--output", folder / "out" / "refined.json", *weights]


OF_RESULTS = pytest.mark.parametrize(
    "main", [analyze.main, draw.main, refine.main], ids=["analyze", "draw", "refine"]
)


@OF_RESULTS
@pytest.mark.parametrize("case", RESULTS)
def test_broken_results_are_named(main, case, folder):
    write(folder / "results.json", RESULTS[case])
    assert "results.json" in sentence(main, *arguments_of(main, folder))


@OF_RESULTS
@pytest.mark.parametrize("case", TRUTHS)
def test_broken_ground_truth_is_named(main, case, folder):
    write(folder / "gt.json", TRUTHS[case])
    assert "gt.json" in sentence(main, *arguments_of(main, folder))


@OF_RESULTS
def test_an_output_that_cannot_be_is_named(main, folder):
    (folder / "out").write_text("a file")
    assert "out is" in sentence(main, *arguments_of(main, folder))


# refine decodes an image, and so finds that it is cut, only after it has read its weights.
UNREADABLE = [
    *itertools.product([draw.main, refine.main], [None, b"", b"no image", "deep"]),
    (draw.main, "cut"),
]


@pytest.mark.parametrize(("main", "content"), UNREADABLE)
def test_an_image_that_cannot_be_read_is_named(main, content, folder):
    path = folder / "x.png"
    if content == "cut":
        content = path.read_bytes()[:60]
    if content == "deep":
        cv2.imwrite(str(path), np.full((48, 64), 9000, dtype=np.uint16))
    else:
        write(path, content)
    assert "x.png" in sentence(main, *arguments_of(main, folder))


@pytest.mark.parametrize("weights", [None, b"", b"no weights"])
def test_weights_that_cannot_be_read_are_named(weights, folder):
    write(folder / "model.pth", weights)
    assert "model.pth" in sentence(refine.main, *arguments_of(refine.main, folder))


def test_no_weights_are_said(folder):
    arguments = [*arguments_of(refine.main, folder)[:-1], ""]
    assert "Nothing is trained" in sentence(refine.main, *arguments)


@pytest.mark.parametrize("name", ["0", "-1"])
def test_numbers_that_mean_nothing(name, folder):
    number = arguments_of(draw.main, folder)
    assert "--number" in sentence(draw.main, *number, "--number", name)
    dets = arguments_of(analyze.main, folder)
    assert "--max-dets" in sentence(analyze.main, *dets, "--max-dets", name)


def test_a_threshold_that_is_no_number(folder):
    options = [*arguments_of(draw.main, folder), "--threshold", "nan"]
    assert "--threshold" in sentence(draw.main, *options)


def test_no_detections_and_no_objects_are_no_error(folder):
    write(folder / "results.json", [])
    analyze.main([str(x) for x in arguments_of(analyze.main, folder)])
    draw.main([str(x) for x in arguments_of(draw.main, folder)])
    write(folder / "gt.json", {**TRUTH, "annotations": []})
    analyze.main([str(x) for x in arguments_of(analyze.main, folder)])


@pytest.mark.parametrize(
    "main", [table.main, compare.main, iou_branch.main], ids=["table", "compare", "iou-branch"]
)
@pytest.mark.parametrize("has", ["nothing", "no folder", "a file", "config", "broken config"])
def test_a_folder_that_is_no_run_is_named(main, has, tmp_path):
    run = tmp_path / "run"
    if has == "a file":
        run.write_text("x")
    elif has != "no folder":
        run.mkdir()
    if "config" in has:
        (run / "config.yaml").write_text("SEED: 1" if has == "config" else "SEED: [")
        (run / "metrics.json").write_text('{"bbox/AP": null}')
    output = ["--output", tmp_path / "out"] if main is compare.main else []
    assert "run" in sentence(main, run, *output)


TOO_LARGE = json.dumps({f"bbox/{key}": 10**400 for key in table.AP_KEYS})


@pytest.mark.parametrize(
    "line", ["", "{", "[1]", "null", '{"bbox/AP": "x"}', "[" * 100_000, TOO_LARGE]
)
def test_metrics_that_cannot_be_read_are_named(line, tmp_path):
    (tmp_path / "config.yaml").write_text("SEED: 1")
    (tmp_path / "metrics.json").write_text(line)
    assert "metrics.json" in sentence(table.main, tmp_path)


NO_VIEWS = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "()")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--input", "none.png"], "names no image"),
        (["--input", "HERE/x.png", "--confidence-threshold", "7"], "--confidence-threshold"),
        (["--input", "HERE/x.png", "MODEL.WEIGHTS", ""], "Nothing is trained"),
        (["--input", "HERE/x.png", "MODEL.WEIGHTS", "HERE"], "There is no file"),
        (["--input", "HERE/x.png", "MODEL.WEIGHTS", "HERE/x.png"], "no checkpoint"),
        (["--input", "HERE/x.png", "INPUT.FORMAT", "L"], "INPUT.FORMAT is 'BGR' or 'RGB'"),
        (["--input", "HERE/x.png", *NO_VIEWS], "TEST.AUG.MIN_SIZES"),
        (["--input", "HERE/x.png", "MODEL.DEVICE", "tpu"], "MODEL.DEVICE"),
        (["--input", "HERE/x.png", "MODEL.META_ARCHITECTURE", "X"], "MODEL.META_ARCHITECTURE"),
        (["--input", "HERE/x.png", "MODEL.WEIGTHS", "x"], "MODEL.WEIGHTS"),
        (["--input", "HERE/x.png", "MODEL.WEIGHTS"], "pairs"),
    ],
)
def test_detect_says_what_it_lacks(arguments, said, folder):
    arguments = [argument.replace("HERE", str(folder)) for argument in arguments]
    source, others = arguments[:2], arguments[2:]  # --input takes all that follows
    config = ["--config", "quick/retinanet_shapes", "--output", folder / "out"]
    assert said in sentence(detect.main, *source, *config, *others)
