"""`iou-d2 report` on runs, whole and cut off, and on result files without torch and Detectron2."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from iou_d2 import get_config
from iou_d2.commands import report
from iou_d2.errors import InputError, MissingFileError
from random_coco import make_random_coco


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """gt.json, results.json and the folder images."""
    folder = tmp_path_factory.mktemp("data")
    truth, results = make_random_coco(0, images=6, classes=2)
    (folder / "images").mkdir()
    for image in truth["images"]:
        pixels = np.full((500, 500, 3), 40 * image["id"], np.uint8)
        Image.fromarray(pixels).save(folder / "images" / image["file_name"])
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def make_run(folder, files, record=None):
    """A finished run on `files`, as training leaves it."""
    (folder / "inference").mkdir(parents=True)
    results = (files / "results.json").read_text()
    (folder / "inference/coco_instances_results.json").write_text(results)
    name = f"coco:{files / 'gt.json'}:{files / 'images'}"
    expected = [["bbox", "AP", 50.0, 60.0]]
    cfg = get_config("quick/retinanet_own_data", ["SOLVER.MAX_ITER", "40"])
    cfg.DATASETS.TEST, cfg.TEST.EXPECTED_RESULTS = (name,), expected
    (folder / "config.yaml").write_text(cfg.dump())
    run = {
        "config": "quick/retinanet_own_data",
        "overrides": ["SOLVER.MAX_ITER", "40", "OUTPUT_DIR", "a b"],
        "train": [name],
        "test": [name],
        "seed": 3,
        "devices": ["cpu, 1 thread"],
        "versions": {"torch": "2.11.0"},
        "start": "2026-01-01T00:00:00+00:00",
        "seconds": 12.3,
        "outcome": "finished",
        "results": {"bbox/AP": 99.0, "bbox/APl": None},
    }
    (folder / "run.json").write_text(json.dumps({**run, **(record or {})}))
    lines = [
        '{"iteration": 19, "total_loss": 2.5, "loss_cls": 1.5, "time": 0.25, "data_time": 0.05}',
        '{"iteration": 20, "bbox/AP": 3.25}',
        '{"iteration": 39, "total_loss": 1.5, "loss_cls": NaN, "time": 0.35, "data_time": 0.05}',
        '{"iteration": 40, "bbox/AP": 7.75}',
    ]
    (folder / "metrics.json").write_text("\n".join(lines))
    (folder / "log.txt").write_text(
        "Total inference pure compute time: 0:00:13 (0.196431 s / img per device, on 1 devices)"
    )
    return folder


def written(arguments, output):
    report.main([*map(str, arguments), "--output", str(output), "--draws", "5"])
    text = output.read_text()
    assert [path.name for path in output.parent.glob("*unfinished")] == []
    return text, json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_a_run_with_all_it_holds(tmp_path, files):
    text, data = written([make_run(tmp_path / "run", files)], tmp_path / "out" / "report.html")
    for words in (
        "quick/retinanet_own_data",
        "0.3 s an iteration (median)",
        "0.196 s an image",
        "50 ± 60",
        "The run recorded AP 99.00",
        "OUTPUT_DIR &#x27;a b&#x27;",
        f"iou-d2 report {tmp_path / 'run'}",
    ):
        assert words in text, words
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert charts["AP on the test set"]["series"][0]["points"] == [[21, 3.25], [40, 7.75]]
    assert charts["loss_cls"]["series"][0]["points"] == [[20, 1.5], [40, None]]
    assert len(data["thumbnails"]) > 3


def test_of_several_test_sets_the_curve_is_the_first_ones(tmp_path, files):
    run = make_run(tmp_path / "run", files)
    cfg = get_config(run / "config.yaml")
    (first,) = cfg.DATASETS.TEST
    cfg.DATASETS.TEST = (first, "coco:other.json")
    (run / "config.yaml").write_text(cfg.dump())
    lines = [
        {"iteration": iteration, f"{first}/bbox/AP": ap, "coco:other.json/bbox/AP": 9.5}
        for iteration, ap in ((20, 3.25), (40, 7.75))
    ]
    (run / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    _, data = written([run], tmp_path / "report.html")
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert charts["AP on the test set"]["series"][0]["points"] == [[21, 3.25], [40, 7.75]]


def test_a_run_that_was_cut_off_and_one_whose_data_moved(tmp_path, files):
    run = make_run(tmp_path / "run", files, {"outcome": None, "results": None, "seconds": None})
    with (run / "metrics.json").open("a") as file:
        file.write('\n{"iteration": 41, "total_l')
    (run / "inference/coco_instances_results.json").unlink()
    text, data = written([run], tmp_path / "report.html")
    assert "The run has not ended, or was cut off." in text
    assert "Line 5 of" in text and "the run has not been evaluated" in text
    assert data["galleries"] == []

    moved = make_run(tmp_path / "moved", files)
    config = (moved / "config.yaml").read_text().replace("gt.json", "gone.json")
    (moved / "config.yaml").write_text(config)
    text, _ = written([moved], tmp_path / "report.html")
    assert "gone.json" in text and "99.0" in text


def test_odd_values_of_a_run_become_notes(tmp_path, files):
    record = {
        "train": "coco:x",
        "devices": 3,
        "versions": ["a"],
        "overrides": "SEED 3",
        "seconds": 10**400,
        "results": {"bbox/AP": 10**400, "bbox/AP50": "x", "bbox/AP75": 12.5},
    }
    run = make_run(tmp_path / "run", files, record)
    with (run / "metrics.json").open("a") as file:
        for iteration in ("40.5", "NaN", "Infinity", "1e30", '"x"'):
            file.write(f'\n{{"iteration": {iteration}, "total_loss": 9.5, "bbox/AP": 9.5}}')
        file.write(f'\n{{"iteration": 42, "time": 1{"0" * 400}}}')
    text, data = written([run], tmp_path / "report.html")
    for words in (
        "run.json has train &#x27;coco:x&#x27;, which is left out.",
        "run.json has devices 3, which is left out.",
        "run.json has versions [&#x27;a&#x27;], which is left out.",
        "run.json has overrides &#x27;SEED 3&#x27;, which is left out.",
        "run.json has bbox/AP 1000",
        "run.json has bbox/AP50 &#x27;x&#x27;, which is no number.",
        "6 lines of",
    ):
        assert words in text, words
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert charts["AP on the test set"]["series"][0]["points"] == [[21, 3.25], [40, 7.75]]


def test_a_test_set_with_one_more_class_without_objects_is_the_same(tmp_path, files):
    truth = json.loads((files / "gt.json").read_text())
    truth["categories"].append({"id": 77, "name": "nothing"})
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "images").symlink_to(files / "images")
    results = json.loads((files / "results.json").read_text())
    results.append({**results[0], "category_id": 77})
    (tmp_path / "results.json").write_text(json.dumps(results))
    runs = [make_run(tmp_path / "one", files), make_run(tmp_path / "two", tmp_path)]
    text, _ = written(runs, tmp_path / "report.html")
    assert "95 % interval" in text and "is not on the same images" not in text


def test_runs_stand_side_by_side(tmp_path, files):
    runs = [make_run(tmp_path / name, files) for name in ("one", "two")]
    text, data = written(runs, tmp_path / "report.html")
    assert "Compared with one" in text and "−0.0 to" not in text
    assert [gallery["name"] for gallery in data["galleries"]] == ["one", "two"]


def test_result_files_alone_need_neither_torch_nor_detectron2(tmp_path, files):
    blocked = ("torch", "torchvision", "detectron2", "fvcore", "cv2")
    program = f"""import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked} else super().find_spec(name, path, target)

sys.meta_path = [Without if f is PathFinder else f for f in sys.meta_path]
from iou_d2.commands.main import main
main(["report", "--gt", "gt.json", "--results", "results.json", "results.json", "--images",
      "images", "--names", "a", "b", "--output", {str(tmp_path / "x.html")!r}, "--draws", "5"])
try:
    main(["report", "run"])
except SystemExit as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=files, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "The report is in" in done.stdout
    assert "Result files alone are read without it: see --gt." in done.stdout
    text = (tmp_path / "x.html").read_text()
    assert "Compared with a" in text and text.count("data:image/jpeg") > 3


def test_names_tell_results_apart(tmp_path):
    first = tmp_path / "x/inference/coco_instances_results.json"
    second = tmp_path / "y/coco_instances_results.json"
    assert report.names_of([first, second, tmp_path / "mine.json"]) == ["x", "y", "mine"]
    twice = [tmp_path / "a/mine.json", tmp_path / "b/mine.json"]
    assert report.names_of(twice) == [str(path) for path in twice]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Give either finished runs, or --gt with --results."),
        (["run", "--gt", "gt.json"], "Give either finished runs, or --gt with --results."),
        (["--gt", "gt.json"], "--gt and --results go together."),
        (["run", "--max-dets", "5"], "--images and --max-dets go with --gt"),
        (["nowhere"], "There is no folder nowhere."),
        (["."], ". is no run: it holds none of run.json"),
        (["--gt", "gt.json", "--results", "gone.json"], "There is no results file gone.json."),
        (["--gt", "g", "--results", "r", "--images", "gone"], "There is no folder gone."),
        (["--gt", "g", "--results", "r", "--pictures", "-1"], "--pictures is at least 0, but it"),
        (["--gt", "g", "--results", "r", "--names", "a", "b"], "--names has 2 names for 1 results"),
        (["run", "--output", "images"], "--output images is a folder: give the name of a file."),
    ],
)
def test_mistakes_get_a_sentence(arguments, sentence, files, monkeypatch):
    monkeypatch.chdir(files)
    with pytest.raises((InputError, MissingFileError)) as raised:
        report.main(arguments)
    assert sentence in str(raised.value)
    assert not (files / "report.html").exists()
