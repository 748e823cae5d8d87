"""train_net.py as a user runs it: in a process of its own, on a set of 12 images."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from detectron2.engine import DefaultPredictor
from PIL import Image

from command_line import CONFIG, TINY, command, metrics_of, run, run_alone, start_script
from iou_d2 import get_config
from iou_d2.commands import train
from iou_d2.engine.trainer import Trainer


def test_training_leaves_what_detectron2_users_expect(trained):
    folder, printed = trained
    assert printed.count("CUDA is not available, so the model runs on the CPU.") == 1
    files = {path.name for path in folder.iterdir()}
    assert {"model_final.pth", "last_checkpoint", "metrics.json", "config.yaml", "log.txt"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not any(name.endswith(".unfinished") for name in files)
    metrics = metrics_of(folder)
    assert {"loss_cls", "loss_box_reg", "loss_iou", "lr"} <= set(metrics)
    assert "bbox/AP90" in metrics and "localization/pearson_confidence" in metrics


def test_class_names_are_stored_with_the_model(trained):
    folder, _ = trained
    names = yaml.safe_load((folder / "config.yaml").read_text())["MODEL"]["CLASS_NAMES"]
    assert len(names) > 1
    weights = torch.load(folder / "model_final.pth", weights_only=True)
    assert weights["class_names"] == names


def test_default_predictor_takes_the_saved_config(trained):
    folder, _ = trained
    cfg = get_config(
        str(folder / "config.yaml"), ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    )
    found = DefaultPredictor(cfg)(np.zeros((50, 70, 3), dtype=np.uint8))["instances"]
    assert found.image_size == (50, 70)
    assert {"scores", "cls_scores", "pred_ious"} <= set(found.get_fields())


def test_eval_only_repeats_the_figures_of_training(environment, trained, tmp_path):
    folder, _ = trained
    arguments = ("--eval-only", *TINY, "MODEL.WEIGHTS", str(folder / "model_final.pth"))
    run(environment, command(*arguments, "OUTPUT_DIR", str(tmp_path)))
    figures = metrics_of(tmp_path)
    assert figures.keys() >= {"bbox/AP", "bbox/AP90", "localization/pearson_confidence"}
    for name, value in figures.items():
        assert value == pytest.approx(metrics_of(folder)[name], abs=1e-3, nan_ok=True), name


def test_a_killed_run_resumes_with_iteration_learning_rate_and_momentum(
    environment, tmp_path, monkeypatch
):
    arguments = (*TINY, "SOLVER.MAX_ITER", "400", "SOLVER.CHECKPOINT_PERIOD", "3")
    arguments += ("SOLVER.STEPS", "(2,)", "OUTPUT_DIR", str(tmp_path), "SOLVER.OPTIMIZER", "SGD")
    arguments += ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR")
    killed = start_script(environment, command(*arguments), tmp_path / "printed")
    deadline = time.monotonic() + 200
    while not (tmp_path / "last_checkpoint").exists():
        assert killed.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL

    saved = torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True)
    start = saved["iteration"] + 1
    # What a crash leaves half written is never the checkpoint to go on from.
    (tmp_path / "model_9999999.pth.unfinished").write_bytes(b"half")

    monkeypatch.setenv("DETECTRON2_DATASETS", environment["DETECTRON2_DATASETS"])
    parsed = train.parse_args(["--config-file", CONFIG, *arguments])
    cfg = train.read_config(parsed)
    train.prepare(cfg, parsed, train.start_of(cfg, parsed))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == start
    assert trainer.scheduler.last_epoch == start
    # 0.01 of the config, divided by 10 after iteration 2.
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    old = saved["trainer"]["_trainer"]["optimizer"]["state"]
    new = trainer.optimizer.state_dict()["state"]
    assert len(old) == len(new) > 50
    for index in old:
        assert torch.equal(old[index]["momentum_buffer"], new[index]["momentum_buffer"])
        assert old[index]["momentum_buffer"].abs().sum() > 0

    arguments += ("SOLVER.MAX_ITER", str(start + 1), "DATASETS.TEST", "()")
    printed = run(environment, command("--resume", *arguments))
    assert f"Starting training from iteration {start}" in printed
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == start
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["outcome"] == "finished" and record["earlier"][0]["outcome"] is None


def test_what_was_mended_stands_in_the_log_once(environment, tmp_path):
    image = {"id": 1, "file_name": "a.png", "width": 64, "height": 64}
    boxes = [[8, 8, 30, 30], [5, 5, 0, 9]]
    truth = {
        "images": [image],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 9, "iscrowd": 0}
            for i, box in enumerate(boxes, start=1)
        ],
    }
    (tmp_path / "train.json").write_text(json.dumps(truth))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    data = ("--train", f"coco:{tmp_path}/train.json", "--test", f"coco:{tmp_path}/train.json")
    arguments = (*TINY, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", str(tmp_path / "out"))
    run(environment, command(*data, *arguments))
    log = (tmp_path / "out/log.txt").read_text()
    assert log.count("1 boxes without area were dropped") == 1
    for line in ("Rank of current process", "Starting training from iteration 0"):
        assert log.count(line) == 1
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config["DATASETS"]["TRAIN"][0] == f"coco:{tmp_path}/train.json:{tmp_path}"


def test_a_run_and_its_evaluation_are_recorded_apart(environment, tmp_path):
    where = ("OUTPUT_DIR", str(tmp_path), "SEED", "3")
    expected = ("TEST.EXPECTED_RESULTS", "[['bbox','AP',99,1]]")
    run(environment, command(*TINY, "SOLVER.MAX_ITER", "2", *where, *expected), fails=True)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"] == "quick/iou_retinanet_shapes" and record["seed"] == 3
    assert record["train"] == ["shapes_train_12x64"] and record["test"] == ["shapes_val_6x64"]
    assert record["overrides"][-2:] == list(expected) and record["outcome"] == "SystemExit: 1"
    assert record["results"]["localization/detections"] is not None and record["seconds"] > 0

    before = (tmp_path / "run.json").read_bytes()
    weights = ("MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    run(environment, command("--eval-only", *TINY, *where, *weights))
    assert (tmp_path / "run.json").read_bytes() == before
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["outcome"] == "finished"
    assert evaluation["results"].keys() == record["results"].keys()


@pytest.mark.parametrize("script", ["train_net.py", "demo.py"])
def test_threads_are_told_how_to_wait_before_torch_is_loaded(script, tmp_path):
    """GNU's OpenMP reads the variable when torch loads it."""
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("GOMP_SPINCOUNT is", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
exec(compile(open({script!r}).read(), {script!r}, "exec"))
"""
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    arguments = ["--config", CONFIG]
    if script == "demo.py":
        arguments += ["--input", script, "--output", str(tmp_path)]
    for given, used in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        printed = run_alone({**environment, **given}, [sys.executable, "-c", code, *arguments])
        assert printed == f"GOMP_SPINCOUNT is {used}\n"


def test_a_non_finite_loss_names_iteration_loss_and_images(environment, tmp_path):
    arguments = (*TINY, "SOLVER.MAX_ITER", "20", "SOLVER.BASE_LR", "1e30")
    arguments += ("SOLVER.CLIP_GRADIENTS.ENABLED", "False", "SOLVER.WARMUP_ITERS", "0")
    printed = run(environment, command(*arguments, "OUTPUT_DIR", str(tmp_path)), fails=True)
    sentence = next(line for line in printed.splitlines() if line.startswith("At iteration"))
    assert "At iteration 1 the losses {'loss_" in sentence
    assert "are not finite, for the images with the ids [" in sentence


def test_a_typo_fails_before_anything_is_made(environment, tmp_path):
    arguments = ("OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.MAX_ITERS", "3")
    printed = run(environment, command(*TINY, *arguments), fails=True)
    assert "The nearest valid key is SOLVER.MAX_ITER." in printed
    assert not (tmp_path / "out").exists()
