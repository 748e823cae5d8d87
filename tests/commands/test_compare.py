"""`iou-d2 compare` on two untrained runs over four generated images."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from iou_d2 import get_config
from iou_d2.commands import compare as compare_runs
from iou_d2.config import set_class_names
from iou_d2.data.shapes import ShapesSpec, write_shapes
from iou_d2.errors import InputError
from iou_d2.evaluation.coco import file_stem

CONFIG = "configs/quick/unitbox_shapes.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two folders as training leaves them; the first run found every object, the second none."""
    folder = tmp_path_factory.mktemp("runs")
    write_shapes(ShapesSpec("val", 4, 64, 0), folder / "shapes")
    truth = json.loads((folder / "shapes/instances.json").read_text())
    perfect = [
        {**{key: x[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9}
        for x in truth["annotations"]
        if not x["iscrowd"]
    ]
    for seed, (name, results) in enumerate([("first", perfect), ("second", [])]):
        run = folder / name
        (run / "inference").mkdir(parents=True)
        data = f"('coco:{folder}/shapes/instances.json:{folder}/shapes/images',)"
        overrides = ["MODEL.DEVICE", "cpu", "DATASETS.TEST", data, "DATALOADER.NUM_WORKERS", "0"]
        cfg = get_config(CONFIG, overrides)
        set_class_names(cfg, [c["name"] for c in truth["categories"]])
        (run / "config.yaml").write_text(cfg.dump())
        torch.manual_seed(seed)
        model = build_model(cfg)
        torch.save({"model": model.state_dict()}, run / "model_final.pth")
        (run / "inference/coco_instances_results.json").write_text(json.dumps(results))
        lines = [{"iteration": 99, "bbox/AP": 10 + seed}, {"iteration": 2500, "bbox/AP": 20.5}]
        (run / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    return [folder / "first", folder / "second"]


def table(printed: str, header: str) -> list[list[str]]:
    lines = printed[printed.index(header) :].split("\n\n")[0].splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]
    ]


def test_curves_and_tables(runs, tmp_path, capsys):
    compare_runs.main([*map(str, runs), "--output", str(tmp_path / "a/b"), "--sides", "96", "32"])
    printed = capsys.readouterr().out
    names = {"recall_by_false_positives.png", "ap_by_iteration.png", "ap_by_side.png"}
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == names
    assert table(printed, "recall at false positives")[1:] == [
        ["first", *["1"] * 5],
        ["second", *["-"] * 5],
    ]
    assert table(printed, "AP at iteration") == [
        ["AP at iteration", "100", "2500"],
        ["first", "10", "20.5"],
        ["second", "11", "20.5"],
    ]
    header, *rows = table(printed, "AP at side")
    assert header[1:] == ["32", "96"] and [row[0] for row in rows] == ["first", "second"]
    assert all(0 <= float(value) < 50 for row in rows for value in row[1:])


def copied(run, to, overrides):
    """A run with other settings, which has no weights."""
    (to / "inference").mkdir(parents=True)
    cfg = get_config(run / "config.yaml", overrides)
    (to / "config.yaml").write_text(cfg.dump())
    for name in ("metrics.json", f"inference/{compare_runs.RESULTS}"):
        shutil.copy(run / name, to / name)
    return to


def test_classes_that_the_model_does_not_know_do_not_count(runs):
    cfg = get_config(runs[0] / "config.yaml")
    cfg.DATASETS.TRUST_CLASSES = True
    truth = compare_runs.read_truth(compare_runs.with_test_set(cfg.clone(), runs[0]))
    known = truth["categories"][0]
    set_class_names(cfg, [known["name"]])
    truth = compare_runs.read_truth(compare_runs.with_test_set(cfg, runs[0]))
    assert truth["categories"] == [known]
    assert {annotation["category_id"] for annotation in truth["annotations"]} == {known["id"]}


def test_of_several_test_sets_the_first_one_is_compared(runs, tmp_path, capsys):
    cfg = get_config(runs[0] / "config.yaml")
    (first,) = cfg.DATASETS.TEST
    run = copied(runs[0], tmp_path / "run", ["DATASETS.TEST", f"('{first}', 'coco:other.json')"])
    folder = run / "inference" / file_stem(first)
    folder.mkdir()
    (run / "inference" / compare_runs.RESULTS).rename(folder / compare_runs.RESULTS)
    lines = [{"iteration": 99, f"{first}/bbox/AP": 10, "coco:other.json/bbox/AP": 99}]
    (run / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    compare_runs.main([str(run), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert table(printed, "recall at false positives")[1:] == [["run", *["1"] * 5]]
    assert table(printed, "AP at iteration") == [["AP at iteration", "100"], ["run", "10"]]


def test_runs_on_other_objects_are_warned_of(runs, tmp_path, monkeypatch):
    said = []
    logger = logging.getLogger("iou_d2.commands.compare")
    monkeypatch.setattr(logger, "warning", said.append)
    compare_runs.main([*map(str, runs), "--output", str(tmp_path / "out")])
    assert said == []
    (first,) = get_config(runs[0] / "config.yaml").DATASETS.TEST
    _, path, images = first.split(":")
    truth = json.loads(Path(path).read_text())
    truth["annotations"][0]["bbox"][2] -= 1
    (tmp_path / "other.json").write_text(json.dumps(truth))
    data = f"('coco:{tmp_path}/other.json:{images}',)"
    run = copied(runs[1], tmp_path / "run", ["DATASETS.TEST", data])
    compare_runs.main([str(runs[0]), str(run), "--output", str(tmp_path / "out")])
    assert len(said) == 1 and f"{run} is not on the same images and objects" in said[0]


@pytest.mark.parametrize("iteration", ["9.5", "NaN", "1e400", '"x"'])
def test_an_iteration_that_is_no_whole_number_is_named(runs, tmp_path, iteration):
    run = copied(runs[0], tmp_path / "run", [])
    (run / "metrics.json").write_text(f'{{"iteration": {iteration}, "bbox/AP": 10.0}}')
    with pytest.raises(InputError, match=r"metrics\.json has a line whose iteration is no whole"):
        compare_runs.main([str(run), "--output", str(tmp_path)])


def test_results_at_a_side_are_those_of_the_resized_images_and_kept(runs, tmp_path, monkeypatch):
    cfg = compare_runs.setup(runs[0])
    truth = compare_runs.read_truth(cfg)
    cfg.INPUT.MAX_SIZE_TEST = 30  # of the run, and not of a side
    folder, seen = tmp_path / "side", []

    def look(model, loader, evaluator):
        seen.append([tuple(batch[0]["image"].shape) for batch in loader])
        (folder / compare_runs.RESULTS).write_text("[]")

    folder.mkdir()
    monkeypatch.setattr(compare_runs, "inference_on_dataset", look)
    for _ in range(2):
        assert compare_runs.detect_at_side(cfg, truth, 40, folder) == []
        assert seen == [[(3, 40, 40)] * 4]

    cfg.MODEL.UNITBOX.SCORE_THRESH_TEST = 0.3
    compare_runs.detect_at_side(cfg, truth, 40, folder)
    assert len(seen) == 2
    old = (runs[0] / "model_final.pth").stat().st_mtime - 5
    os.utime(folder / compare_runs.RESULTS, (old, old))
    compare_runs.detect_at_side(cfg, truth, 40, folder)
    assert len(seen) == 3
    assert cfg.INPUT.MIN_SIZE_TEST == 128


def test_runs_of_one_name_are_told_apart(runs, tmp_path, capsys):
    for folder, run in zip("ab", runs):
        shutil.copytree(run, tmp_path / folder / "run")
    places = [str(tmp_path / folder / "run") for folder in "ab"]
    compare_runs.main([*places, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert [row[0] for row in table(printed, "recall at false positives")[1:]] == places


def test_weights_that_would_run_code_are_read_where_one_trusts_them(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    content = torch.load(run / "model_final.pth")
    torch.save({**content, "made_by": argparse.Namespace()}, run / "model_final.pth")
    arguments = [str(run), "--output", str(tmp_path), "--sides", "32"]
    with pytest.raises(InputError, match="it asks for argparse.Namespace"):
        compare_runs.main(arguments)
    compare_runs.main([*arguments, "--trust-weights"])
    assert (tmp_path / "ap_by_side.png").is_file()


def test_a_model_of_one_size_has_no_other_sides(tmp_path):
    cfg = get_config("quick/ssd_shapes", ["MODEL.DEVICE", "cpu"])
    with pytest.raises(InputError, match='has "square", so there are .* INPUT.SQUARE_SIZE 128'):
        compare_runs.detect_at_side(cfg, {}, 96, tmp_path)
