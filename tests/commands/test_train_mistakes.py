"""Nothing is evaluated, resumed or overwritten by mistake, and every refusal is one line."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from command_line import command, outcome, run
from iou_d2.commands import train
from iou_d2.errors import InputError

pytestmark = pytest.mark.usefixtures("own_catalogs")

OWN = "configs/quick/iou_retinanet_own_data.yaml"
SMALL = (
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "MODEL.WEIGHTS", ""),
    *("SOLVER.MAX_ITER", "1", "SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "0"),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
)
NAMES = {1: "cat", 2: "dog", 3: "cow"}


def write_set(folder: Path, categories: dict[int, str], objects: dict[str, int] | None = None):
    """Two images; `objects` counts those of each name, two of each category where it is None."""
    (folder / "images").mkdir(parents=True)
    counts = objects if objects is not None else dict.fromkeys(categories.values(), 2)
    ids = {name: id_ for id_, name in categories.items()}
    names = [name for name in sorted(counts) for _ in range(counts[name])]
    annotations = [
        {"id": n, "image_id": n % 2 + 1, "category_id": ids[name], "bbox": [4 * n, 2 * n, 20, 24],
         "area": 480, "iscrowd": 0}
        for n, name in enumerate(names, 1)
    ]  # fmt: skip
    noise = np.random.default_rng(0)
    images = []
    for n in (1, 2):
        pixels = noise.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{n}.png")
        images.append({"id": n, "file_name": f"{n}.png", "width": 64, "height": 64})
    data = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }
    (folder / "a.json").write_text(json.dumps(data))
    return f"coco:{folder}/a.json"


@pytest.fixture
def own_catalogs(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


@pytest.fixture(scope="module")
def three(environment, tmp_path_factory):
    """A run on cat, dog and cow: its folder, and the name of its data."""
    folder = tmp_path_factory.mktemp("three")
    data = write_set(folder / "data", NAMES)
    arguments = (*SMALL, "--train", data, "--test", data, "OUTPUT_DIR", str(folder / "out"))
    run(environment, command(*_options_first(arguments), config=OWN))
    return folder / "out", data


def _options_first(arguments: tuple[str, ...]) -> list[str]:
    """--train and --test come before the KEY VALUE pairs."""
    start = arguments.index("--train") if "--train" in arguments else arguments.index("--test")
    end = arguments.index("OUTPUT_DIR")
    return [*arguments[start:end], *arguments[:start], *arguments[end:]]


def evaluate(environment, data: str, output: Path, *more: str, refused: bool = False) -> str:
    pairs = [*SMALL, "OUTPUT_DIR", str(output), *more]
    return run(
        environment, command("--eval-only", "--test", data, *pairs, config=OWN), fails=refused
    )


def last_lines(environment, *arguments: str) -> tuple[int, list[str]]:
    """The exit status, and what was said."""
    status, printed = outcome(environment, command(*arguments, config=OWN))
    return status, printed.strip().splitlines()


def detections(folder: Path) -> list[dict]:
    return json.loads((folder / "inference/coco_instances_results.json").read_text())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_classes_in_another_order_are_mapped_by_name(environment, three, tmp_path):
    folder, data = three
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    evaluate(environment, data, tmp_path / "same", *weights)
    other_ids = {7: "cow", 8: "cat", 9: "dog"}
    other = write_set(tmp_path / "other", other_ids)
    evaluate(environment, other, tmp_path / "mapped", *weights)
    same, mapped = detections(tmp_path / "same"), detections(tmp_path / "mapped")
    assert len(same) == len(mapped) > 10
    for a, b in zip(same, mapped):
        assert NAMES[a["category_id"]] == other_ids[b["category_id"]]
        assert a["bbox"] == b["bbox"] and a["score"] == b["score"]
    results = [
        json.loads((tmp_path / name / "evaluation.json").read_text())["results"]
        for name in ("same", "mapped")
    ]
    assert "bbox/AP-cow" in results[0]
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value), name


def test_a_test_set_may_lack_a_class(environment, three, tmp_path):
    folder, _ = three
    data = write_set(tmp_path / "data", {4: "dog", 5: "cat"})
    evaluate(environment, data, tmp_path / "out", "MODEL.WEIGHTS", str(folder / "model_final.pth"))
    assert {d["category_id"] for d in detections(tmp_path / "out")} == {4, 5}
    results = json.loads((tmp_path / "out/evaluation.json").read_text())["results"]
    assert "bbox/AP-cat" in results and "bbox/AP-cow" not in results


@pytest.mark.parametrize("how", [("--eval-only",), ("--resume",)])
def test_other_names_are_refused_before_anything_is_written(environment, three, tmp_path, how):
    folder, _ = three
    before = snapshot(folder)
    data = write_set(tmp_path / "data", {1: "cat", 2: "dog", 3: "horse"})
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    where = ("--train", data, "--test", data, *SMALL, *weights, "OUTPUT_DIR", str(folder))
    status, said = last_lines(environment, *how, *where)
    assert status == 1
    assert "cat, dog, cow" in said[-1] and "cat, dog, horse" in said[-1]
    assert not any("Traceback" in line for line in said)
    after = snapshot(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {"log.txt", ".lock"}


def test_an_unknown_class_is_left_out_where_the_user_says_so(environment, three, tmp_path):
    folder, _ = three
    data = write_set(tmp_path / "data", {1: "cat", 2: "dog", 3: "horse"})
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    evaluate(environment, data, tmp_path / "out", *weights, "DATASETS.TRUST_CLASSES", "True")
    results = json.loads((tmp_path / "out/evaluation.json").read_text())["results"]
    assert "bbox/AP-cat" in results and "bbox/AP-horse" not in results


def test_evaluation_without_weights_is_refused(three, tmp_path):
    _, data = three
    where = ("--test", data, *SMALL, "OUTPUT_DIR", str(tmp_path / "out"))
    with pytest.raises(InputError, match="Nothing is trained that --eval-only could evaluate"):
        train.main(["--eval-only", "--config", OWN, *where])
    assert not (tmp_path / "out").exists()


def test_weights_that_leave_a_part_untrained_are_refused(environment, three, tmp_path):
    folder, data = three
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"), "MODEL.RETINANET.NUM_CONVS", "3")
    printed = evaluate(environment, data, tmp_path / "out", *weights, refused=True)
    assert "The weights do not fit the config" in printed and "Traceback" not in printed


def test_evaluation_leaves_the_config_of_the_training(environment, three):
    folder, data = three
    before = (folder / "config.yaml").read_bytes()
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    evaluate(environment, data, folder, *weights, "MODEL.RETINANET.NMS_THRESH_TEST", "0.9")
    assert (folder / "config.yaml").read_bytes() == before
    assert "NMS_THRESH_TEST: 0.9" in (folder / "evaluation_config.yaml").read_text()


def test_two_test_sets_with_long_names_have_two_folders(environment, three, tmp_path):
    folder, _ = three
    deep = tmp_path / ("a_long_name_of_a_project_" * 5)
    data = [write_set(deep / part, NAMES) for part in ("val", "test")]
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    pairs = (*SMALL, *weights, "OUTPUT_DIR", str(tmp_path / "out"))
    run(environment, command("--eval-only", "--test", *data, *pairs, config=OWN))
    assert len(list((tmp_path / "out/inference").glob("*/coco_instances_results.json"))) == 2


def test_nothing_to_learn_is_an_error_at_once(tmp_path):
    data = write_set(tmp_path / "data", NAMES, objects={})
    where = ("--train", data, "--test", data, *SMALL, "OUTPUT_DIR", str(tmp_path / "out"))
    with pytest.raises(InputError, match="There is not one object to learn in the 2 images"):
        train.main(["--config", OWN, *where])


def test_a_cut_test_image_is_found_before_training(tmp_path):
    train_set, test_set = (write_set(tmp_path / part, NAMES) for part in ("train", "test"))
    image = tmp_path / "test/images/2.png"
    image.write_bytes(image.read_bytes()[:2000])
    where = ("--train", train_set, "--test", test_set, *SMALL, "OUTPUT_DIR", str(tmp_path / "out"))
    with pytest.raises(InputError, match="1 of the 2 images of coco:") as error:
        train.main(["--config", OWN, *where])
    assert str(image) in str(error.value)
    assert "Starting training" not in (tmp_path / "out/log.txt").read_text()


def test_a_second_run_in_the_same_folder_is_refused(environment, three, tmp_path):
    _, data = three
    code = (
        "import sys, time; from iou_d2.engine.lock import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); time.sleep(100)"
    )
    holder = subprocess.Popen(
        [command()[0], "-c", code, str(tmp_path)], env=environment, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        status, said = last_lines(
            environment, "--train", data, "--test", data, *SMALL, "OUTPUT_DIR", str(tmp_path)
        )
    finally:
        holder.kill()
        holder.wait()
    assert status == 1 and f"process {holder.pid} on {os.uname().nodename}" in said[-1]
    assert not (tmp_path / "config.yaml").exists()
