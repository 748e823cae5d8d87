"""`iou-d2 train`, `eval` and `detect` on a GPU as a user runs them, in this process."""

from __future__ import annotations

import json
import math

import pytest
import torch

from command_line import CONFIG, TINY, metrics_of
from iou_d2.commands import detect, train

SETTINGS = (*TINY, "SOLVER.CHECKPOINT_PERIOD", "100", "TEST.DETECTIONS_PER_IMAGE", "20")


def run(*arguments: str, config: str = CONFIG) -> None:
    train.main(["--config-file", config, "--num-gpus", "1", *arguments])


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The generated images are made here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    """The folder of a run of 20 iterations."""
    folder = tmp_path_factory.mktemp("run")
    run(*SETTINGS, "SOLVER.MAX_ITER", "20", "OUTPUT_DIR", str(folder))
    return folder


def test_a_training_on_the_gpu_leaves_a_model_and_its_figures(trained):
    metrics = metrics_of(trained)
    assert math.isfinite(metrics["total_loss"]) and "bbox/AP90" in metrics
    record = json.loads((trained / "run.json").read_text())
    assert torch.cuda.get_device_name() in json.dumps(record)
    weights = torch.load(trained / "model_final.pth", weights_only=True)
    assert weights["iteration"] == 19


def test_it_resumes(trained):
    run("--resume", *SETTINGS, "SOLVER.MAX_ITER", "24", "OUTPUT_DIR", str(trained))
    weights = torch.load(trained / "model_final.pth", weights_only=True)
    assert weights["iteration"] == 23
    iterations = [json.loads(x)["iteration"] for x in (trained / "metrics.json").open()]
    assert iterations == sorted(iterations) and iterations[-1] >= 23


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_eval_only_repeats_the_figures(trained, tmp_path, device):
    weights = ("MODEL.WEIGHTS", str(trained / "model_final.pth"), "MODEL.DEVICE", device)
    run("--eval-only", *SETTINGS, *weights, "OUTPUT_DIR", str(tmp_path))
    last = metrics_of(trained)
    figures = {name: x for name, x in metrics_of(tmp_path).items() if name.startswith("bbox/")}
    assert figures
    for name, value in figures.items():
        assert value == pytest.approx(last[name], abs=0.5, nan_ok=True), name


@pytest.mark.parametrize(
    "settings",
    [
        ("SOLVER.AMP.ENABLED", "True", "SOLVER.EMA_DECAY", "0.9"),
        ("MODEL.PRECISION", "bfloat16", "MODEL.MEMORY_FORMAT", "channels_last"),
    ],
    ids=str,
)
def test_training_in_mixed_precision(datasets, tmp_path, settings):
    config = "configs/quick/iou_net_shapes.yaml"
    run(*SETTINGS, *settings, "SOLVER.MAX_ITER", "5", "OUTPUT_DIR", str(tmp_path), config=config)
    assert math.isfinite(metrics_of(tmp_path)["total_loss"])
    assert (tmp_path / "model_final.pth").is_file()


def test_detect_says_what_it_finds(trained, tmp_path):
    images = sorted(trained.parent.glob("datasets*/**/shapes_val_6x64/images"))[0]
    weights = ("MODEL.WEIGHTS", str(trained / "model_final.pth"), "INPUT.MIN_SIZE_TEST", "64")
    source = ("--input", str(images), "--output", str(tmp_path), "--confidence-threshold", "0")
    detect.main(["--config-file", CONFIG, *source, *weights])
    records = json.loads((tmp_path / "detections.json").read_text())
    assert len(records) == 6
