"""Several CPU processes train and evaluate as one does, whoever started them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.distributed.run

from command_line import TINY, command, metrics_of, run, start_script
from iou_d2.engine.launch import free_port

# No batch norm, whose statistics are those of a process, and nothing random in the data. Clipping
# bites in each step.
CONFIG = "configs/quick/atss_shapes.yaml"
SAME_DATA = (
    *(*TINY, "MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN", "INPUT.RANDOM_FLIP", "none"),
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.1"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "10", "SOLVER.CHECKPOINT_PERIOD", "5"),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
)
SHORT = (*TINY, "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()")


def weights_of(path) -> torch.Tensor:
    model = torch.load(path, weights_only=True)["model"]
    return torch.cat([model[name].flatten() for name in sorted(model)])


@pytest.fixture(scope="module")
def alone(environment, tmp_path_factory):
    """Ten iterations in one process."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = ("--num-gpus", "0", *SAME_DATA, "OUTPUT_DIR", str(folder))
    run(environment, command(*arguments, config=CONFIG))
    return folder


def assert_as_alone(folder, alone):
    expected, found = metrics_of(alone), metrics_of(folder)
    names = [name for name in expected if "loss" in name]
    assert len(names) == 4 and found["iteration"] == expected["iteration"] == 10
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    before, after = (weights_of(alone / f"model_{name}.pth") for name in ("0000004", "final"))
    moved = (after - before).norm()
    assert (weights_of(folder / "model_final.pth") - after).norm() < 1e-3 * moved
    for name in ("bbox/AP", "bbox/AP50", "localization/detections"):
        assert found[name] == pytest.approx(expected[name], abs=1e-3), name


def test_two_processes_train_as_one(environment, alone, tmp_path):
    arguments = ("--num-gpus", "0", "--num-processes", "2", "--dist-url", "auto", *SAME_DATA)
    printed = run(environment, command(*arguments, "OUTPUT_DIR", str(tmp_path), config=CONFIG))
    assert_as_alone(tmp_path, alone)
    assert printed.count("Starting training from iteration 0") == 1
    assert "World size: 2" in (tmp_path / "log.txt.rank1").read_text()
    assert len(json.loads((tmp_path / "run.json").read_text())["devices"]) == 2


def test_two_machines_train_as_one(environment, alone, tmp_path):
    url = f"tcp://127.0.0.1:{free_port()}"
    machines = []
    for rank in range(2):
        place = ("--num-machines", "2", "--machine-rank", str(rank), "--dist-url", url)
        arguments = command(*place, *SAME_DATA, "OUTPUT_DIR", str(tmp_path / "out"), config=CONFIG)
        printed = tmp_path / f"printed_{rank}"
        machines.append(start_script(environment, arguments, printed, method="fork"))
    for machine in machines:
        machine.join(timeout=250)
        machine.kill()  # has no effect where it has ended
        machine.join()
    assert [machine.exitcode for machine in machines] == [0, 0]
    assert_as_alone(tmp_path / "out", alone)


def test_torchrun_trains_as_one(environment, alone, tmp_path):
    torchrun = torch.distributed.run.__file__
    options = ("--nproc_per_node", "2", "--master_port", str(free_port()))
    arguments = command(*SAME_DATA, "OUTPUT_DIR", str(tmp_path), config=CONFIG)[1:]
    run(environment, [sys.executable, torchrun, *options, *arguments])
    assert_as_alone(tmp_path, alone)


def test_torchrun_with_processes_of_our_own_is_refused(environment, tmp_path):
    of_torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    arguments = command("--num-processes", "2", *SHORT, "OUTPUT_DIR", str(tmp_path / "out"))
    printed = run(environment | of_torchrun, arguments, fails=True)
    assert "torchrun has started the processes: leave out" in printed
    assert not (tmp_path / "out").exists()


def test_two_processes_evaluate_as_one(environment, trained, tmp_path):
    folder, _ = trained
    arguments = ("--num-gpus", "0", "--num-processes", "2", "--dist-url", "auto", "--eval-only")
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"), "OUTPUT_DIR", str(tmp_path))
    run(environment, command(*arguments, *TINY, *weights), method="fork")
    figures = metrics_of(tmp_path)
    assert figures.keys() >= {"bbox/AP", "bbox/AP90", "localization/pearson_confidence"}
    for name, value in figures.items():
        assert value == pytest.approx(metrics_of(folder)[name], abs=1e-3, nan_ok=True), name


def test_more_gpus_than_there_are_are_one_cpu_process(environment, tmp_path):
    printed = run(environment, command("--num-gpus", "2", *SHORT, "OUTPUT_DIR", str(tmp_path)))
    assert "--num-gpus needs CUDA, so one CPU process is used." in printed
    assert not (tmp_path / "log.txt.rank1").exists()
