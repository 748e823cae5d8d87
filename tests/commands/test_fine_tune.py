"""Fine-tuning as a user does it: `iou-d2 train` from a checkpoint, in processes of their own."""

from __future__ import annotations

import json

import pytest
import torch

from coco_files import annotation, two_images, write
from command_line import TINY, command, run

OWN = "configs/quick/iou_retinanet_own_data.yaml"
# The learning rate is too small to move a weight.
KEYS = (
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0"),
    *("SOLVER.WARMUP_ITERS", "0", "SOLVER.BASE_LR", "1e-30", "SOLVER.OPTIMIZER", "SGD"),
)


def write_set(folder, names: list[str]) -> str:
    """Two images with an object of each class."""
    folder.mkdir()
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    annotations = [annotation(i, [4, 4, 20, 20], category_id=i) for i in range(1, len(names) + 1)]
    data = two_images() | {"categories": categories, "annotations": annotations}
    return f"coco:{write(folder, data)}"


@pytest.fixture(scope="module")
def three(environment, tmp_path_factory):
    """A run on cat, dog and cow."""
    folder = tmp_path_factory.mktemp("three")
    data = write_set(folder / "data", ["cat", "dog", "cow"])
    pairs = (*KEYS, "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(folder / "out"))
    run(environment, command("--train", data, *pairs, config=OWN))
    return folder / "out"


def read(path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("names", "options"), [(["dog", "emu", "cow"], []), (["emu", "cow"], ["--resume"])]
)
def test_other_classes_of_the_data(environment, three, tmp_path, names, options):
    """As many with other names, or fewer: the rows of those with the same names stay, also with
    --resume where there is nothing to resume yet."""
    data = write_set(tmp_path / "data", names)
    where = ("MODEL.WEIGHTS", str(three / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "out"))
    pairs = (*KEYS, *where, "SEED", "2")  # other fresh rows than those of the first run
    run(environment, command(*options, "--train", data, *pairs, config=OWN))
    first, second = (read(x / "model_final.pth") for x in (three, tmp_path / "out"))
    known, found = first["class_names"], second["class_names"]
    assert sorted(found) == sorted(names)
    for part in ("weight", "bias"):
        before = first["model"][f"head.cls_score.{part}"].unflatten(0, (-1, len(known)))
        after = second["model"][f"head.cls_score.{part}"].unflatten(0, (-1, len(found)))
        for i, name in enumerate(found):
            if name in known:
                torch.testing.assert_close(after[:, i], before[:, known.index(name)])
            elif part == "weight":  # fresh biases are alike
                assert not any(torch.equal(after[:, i], x) for x in before.unbind(1))
    kept = ", ".join(name for name in found if name in known)
    log = (tmp_path / "out/log.txt").read_text()
    assert f"the rows of {kept} are kept in 2 tensors; emu start anew." in log


EVERY = ("TEST.EVAL_PERIOD", "1", "SOLVER.PATIENCE", "2", "SOLVER.MAX_ITER", "20")
# Nothing moves, so that AP is the same each time.
STILL = (
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "SOLVER.CHECKPOINT_PERIOD", "100"),
    *("SOLVER.BASE_LR", "1e-30", "SOLVER.OPTIMIZER", "SGD", "SOLVER.FREEZE", "['backbone']"),
    *("SOLVER.EMA_DECAY", "0.9", "SOLVER.LR_FACTORS", "[['head', 0.5], ['head.cls_subnet', 0.1]]"),
)


def test_two_processes_stop_together(environment, tmp_path):
    arguments = ("--num-gpus", "0", "--num-processes", "2", "--dist-url", "auto", *TINY, *EVERY)
    where = ("OUTPUT_DIR", str(tmp_path))
    printed = run(environment, command(*arguments, *STILL, *where), method="fork")
    assert printed.count("Training stops after 3 iterations, for no evaluation since that") == 1
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["outcome"] == "finished" and record["stopped_early_after"] == 3
    assert record["best"] == {"AP": record["results"]["bbox/AP"], "iterations": 1}
    final, best = (read(tmp_path / f"model_{name}.pth") for name in ("final", "best"))
    assert final["iteration"] == 2 and best["iteration"] == 0
    assert final["trainer"]["ema"]["updates"] == 3
    same = [
        torch.equal(x, best["model"][name])
        for name, x in final["model"].items()
        if name.startswith("backbone.")
    ]
    assert len(same) > 20 and all(same)

    one = command("--resume", "--num-gpus", "0", *TINY, *EVERY, *STILL, *where)
    printed = run(environment, one)
    assert "Training stopped after 3 iterations for want of a better AP" in printed
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["stopped_early_after"] == 3 and record["best"]["iterations"] == 1


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (("SOLVER.FREEZE", "['backbone.botom_up']"), "The nearest names are backbone.bottom_up"),
        (("SOLVER.FREEZE", "backbone"), "The command line sets SOLVER.FREEZE to backbone"),
    ],
)
def test_mistakes_end_in_one_line(environment, tmp_path, keys, sentence):
    where = ("OUTPUT_DIR", str(tmp_path / "out"))
    printed = run(environment, command(*TINY, *keys, *where), fails=True)
    assert sentence in printed.splitlines()[-1] and "Traceback" not in printed
