"""train_net.py and demo.py as a user runs them: in their own processes, on a set of 12 images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.engine import DefaultPredictor, default_argument_parser

import train_net
from iou_d2 import get_config

CONFIG = "configs/quick/iou_retinanet_shapes.yaml"
TINY = (
    *("DATASETS.TRAIN", "('shapes_train_12x64',)", "DATASETS.TEST", "('shapes_val_6x64',)"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "2"),
    *("SOLVER.BASE_LR", "0.01", "TEST.EXPECTED_RESULTS", "[]"),
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    datasets = tmp_path_factory.mktemp("datasets")
    return {
        **os.environ,
        "DETECTRON2_DATASETS": str(datasets),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.getcwd(),
    }


def command(*arguments: str, script: str = "train_net.py") -> list[str]:
    return [sys.executable, script, "--config-file", CONFIG, *arguments]


def run(environment, *arguments: str, script: str = "train_net.py", fails: bool = False) -> str:
    done = subprocess.run(
        command(*arguments, script=script),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (done.returncode != 0) == fails, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(environment, tmp_path_factory):
    """A run of 4 iterations: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    printed = run(environment, *TINY, "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", str(folder))
    return folder, printed


def metrics_of(folder) -> dict:
    lines = (folder / "metrics.json").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


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
    run(environment, *arguments, "OUTPUT_DIR", str(tmp_path))
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
    killed = subprocess.Popen(
        command(*arguments), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "last_checkpoint").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    saved = torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True)
    start = saved["iteration"] + 1
    # What a crash leaves half written is never the checkpoint to go on from.
    (tmp_path / "model_9999999.pth.unfinished").write_bytes(b"half")

    monkeypatch.setenv("DETECTRON2_DATASETS", environment["DETECTRON2_DATASETS"])
    parsed = default_argument_parser().parse_args(["--config-file", CONFIG, *arguments])
    trainer = train_net.Trainer(train_net.setup(parsed))
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
    printed = run(environment, "--resume", *arguments)
    assert f"Starting training from iteration {start}" in printed
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == start


def test_a_non_finite_loss_names_iteration_loss_and_images(environment, tmp_path):
    arguments = (*TINY, "SOLVER.MAX_ITER", "20", "SOLVER.BASE_LR", "1e30")
    arguments += ("SOLVER.CLIP_GRADIENTS.ENABLED", "False", "SOLVER.WARMUP_ITERS", "0")
    printed = run(environment, *arguments, "OUTPUT_DIR", str(tmp_path), fails=True)
    sentence = next(line for line in printed.splitlines() if "FloatingPointError: At it" in line)
    assert "At iteration 1 the losses {'loss_" in sentence
    assert "are not finite, for the images with the ids [" in sentence


def test_a_typo_fails_before_anything_is_made(environment, tmp_path):
    arguments = ("OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.MAX_ITERS", "3")
    printed = run(environment, *TINY, *arguments, fails=True)
    assert "The nearest valid key is SOLVER.MAX_ITER." in printed
    assert not (tmp_path / "out").exists()


def demo(environment, folder, source: list[str], output, fails: bool = False) -> str:
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    arguments = (*source, "--output", str(output), "--confidence-threshold", "0", *weights)
    return run(environment, *arguments, "INPUT.MIN_SIZE_TEST", "64", script="demo.py", fails=fails)


def test_demo_draws_folders_and_globs_and_names_classes(environment, trained, tmp_path):
    folder, _ = trained
    for name in ("a/x.png", "b/x.png", "c/y.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.full((48, 64, 3), 90, dtype=np.uint8))
    source = ["--input", str(tmp_path / "a"), str(tmp_path / "b/x.png"), str(tmp_path / "c/*.jpg")]
    demo(environment, folder, source, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "x.png", "x_2.png", "y.jpg", "detections.json"
    }  # fmt: skip
    records = json.loads((tmp_path / "out/detections.json").read_text())
    assert [r["height"] for r in records] == [48, 48, 48]
    names = yaml.safe_load((folder / "config.yaml").read_text())["MODEL"]["CLASS_NAMES"]
    for detection in (d for record in records for d in record["detections"]):
        assert detection["class"] in names and 0 <= detection["pred_iou"] <= 1


def test_demo_draws_a_video(environment, trained, tmp_path):
    folder, _ = trained
    path = str(tmp_path / "in.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for value in (0, 100, 200):
        writer.write(np.full((48, 64, 3), value, dtype=np.uint8))
    writer.release()
    demo(environment, folder, ["--video-input", path], tmp_path / "out")
    assert len(json.loads((tmp_path / "out/detections.json").read_text())) == 3
    drawn = cv2.VideoCapture(str(tmp_path / "out/in.mp4"))
    assert int(drawn.get(cv2.CAP_PROP_FRAME_COUNT)) == 3


def test_demo_names_what_it_cannot_read(environment, trained, tmp_path):
    folder, _ = trained
    (tmp_path / "broken.png").write_bytes(b"no image")
    for source, sentence in (
        (["--input", str(tmp_path / "none*.png")], "none*.png names no image."),
        (["--input", str(tmp_path / "broken.png")], "broken.png cannot be read as an image"),
        (["--video-input", str(tmp_path / "broken.png")], "broken.png"),
    ):
        assert sentence in demo(environment, folder, source, tmp_path / "out", fails=True)
