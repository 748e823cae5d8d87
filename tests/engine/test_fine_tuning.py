"""The trainer with its fine-tuning keys, on a few small images in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from coco_files import HEIGHT, WIDTH, two_images, write
from iou_d2.commands import train
from iou_d2.engine.trainer import Trainer
from iou_d2.errors import InputError

CONFIG = "configs/quick/atss_own_data.yaml"
# One size of images and no random flip: what a resumed run sees is what it would have seen. ATSS
# keeps nothing outside of its tensors. Batch norm has statistics to average.
KEYS = (
    *("MODEL.WEIGHTS", "", "MODEL.MOBILENET_V2.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.MOBILENET_V2.WIDTH", "0.25", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.POINT_DETECTOR.NUM_GROUPS", "4", "MODEL.RETINANET.NUM_CONVS", "1"),
    *("INPUT.MIN_SIZE_TRAIN", "(160,)", "INPUT.MIN_SIZE_TEST", "160", "INPUT.RANDOM_FLIP", "none"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "3"),
    *("SOLVER.WARMUP_ITERS", "0", "SOLVER.BASE_LR", "0.01", "MODEL.DEVICE", "cpu"),
    *("SOLVER.STEPS", "()", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
    *("SEED", "1", "TEST.EVAL_PERIOD", "0", "TEST.EXPECTED_RESULTS", "[]"),
)


@pytest.fixture
def own_data(tmp_path):
    file = write(tmp_path, two_images())
    noise = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        pixels = noise.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    return f"coco:{file}:{tmp_path / 'images'}"


@pytest.fixture
def trainer(own_data, tmp_path):
    """A function: (folder, resume, KEY, VALUE, ...) -> a trainer that is ready to train."""

    def make(folder: str, resume: bool, *overrides: str) -> Trainer:
        arguments = ["--config-file", CONFIG, *(["--resume"] if resume else [])]
        arguments += ["--train", own_data, "--test", own_data, *KEYS, *overrides]
        parsed = train.parse_args([*arguments, "OUTPUT_DIR", str(tmp_path / folder)])
        cfg = train.read_config(parsed)
        train.prepare(cfg, parsed, train.start_of(cfg, parsed))
        trainer = Trainer(cfg)
        trainer.test = lambda cfg, model: {}  # what an evaluation gives is up to each test
        trainer.resume_or_load(resume=resume)
        return trainer

    return make


def read(path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name


EMA = ("SOLVER.EMA_DECAY", "0.9")


def test_six_iterations_are_three_and_three_more(trainer, tmp_path):
    """The averages and the weights in training, bit for bit."""
    trainer("whole", False, *EMA, "SOLVER.MAX_ITER", "6").train()
    trainer("parts", False, *EMA, "SOLVER.MAX_ITER", "3").train()
    half = read(tmp_path / "parts/model_final.pth")
    trainer("parts", True, *EMA, "SOLVER.MAX_ITER", "6").train()
    whole, parts = (read(tmp_path / f"{name}/model_final.pth") for name in ("whole", "parts"))
    assert_same(parts["model"], whole["model"])
    for key in ("updates", "model"):
        a, b = (x["trainer"]["ema"][key] for x in (parts, whole))
        assert_same(a, b) if key == "model" else None
        assert key == "model" or a == b == 6
    name = "head.cls_pred.weight"
    assert not torch.equal(whole["model"][name], whole["trainer"]["ema"]["model"][name])
    assert not torch.equal(whole["model"][name], half["model"][name])


def test_the_average_changes_nothing_of_the_training_and_is_what_is_evaluated(trainer, tmp_path):
    plain = trainer("plain", False, "SOLVER.MAX_ITER", "3")
    plain.train()
    averaged = trainer("averaged", False, *EMA, "SOLVER.MAX_ITER", "3")
    seen = []
    averaged.test = lambda cfg, model: seen.append(model) or {}
    steps = []
    step = averaged.run_step

    def remember():
        step()
        steps.append({k: x.double() for k, x in averaged.checkpointer.model.state_dict().items()})

    averaged.run_step = remember
    averaged.train()
    assert_same(averaged.checkpointer.model.state_dict(), plain.model.state_dict())
    assert seen == [averaged.average.module]
    saved = read(tmp_path / "averaged/model_final.pth")
    assert_same(saved["model"], seen[0].state_dict())
    assert_same(saved["trainer"]["ema"]["model"], plain.model.state_dict())
    first, second, third = (x["head.cls_pred.weight"] for x in steps)
    after_two = 2 / 11 * first + 9 / 11 * second
    wanted = 3 / 12 * after_two + 9 / 12 * third
    found = saved["model"]["head.cls_pred.weight"].double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_an_average_is_not_dropped_or_begun_without_a_word(trainer, caplog):
    trainer("a", False, *EMA, "SOLVER.MAX_ITER", "1").train()
    with pytest.raises(InputError, match="holds an average of weights, but SOLVER.EMA_DECAY is 0"):
        trainer("a", True, "SOLVER.MAX_ITER", "2")
    trainer("b", False, "SOLVER.MAX_ITER", "1").train()
    resumed = trainer("b", True, *EMA, "SOLVER.MAX_ITER", "2")
    assert "SOLVER.EMA_DECAY begins a new one" in caplog.text
    resumed.train()
    assert_same(resumed.average.module.state_dict(), resumed.model.state_dict())


def test_a_resumed_run_learns_the_same_parameters(trainer):
    freeze = ("SOLVER.FREEZE", "['backbone.bottom_up']", "SOLVER.MAX_ITER", "1")
    first = trainer("a", False, *freeze)
    first.train()
    assert_same(first.model.state_dict(), trainer("a", True, *freeze).model.state_dict())
    with pytest.raises(InputError, match="optimizer of the checkpoint has other parameters"):
        trainer("a", True, "SOLVER.MAX_ITER", "2")
    other = ("SOLVER.FREEZE", "['head.cls_tower']", "SOLVER.MAX_ITER", "2")
    with pytest.raises(InputError, match="optimizer of the checkpoint has other parameters"):
        trainer("a", True, *other)


def test_frozen_parts_that_nothing_was_loaded_into_are_told(trainer, caplog, tmp_path):
    frozen = trainer("a", False, "SOLVER.FREEZE", "['head.cls_tower']", "SOLVER.MAX_ITER", "1")
    train.warn_of_what_starts_anew(frozen)
    assert "SOLVER.FREEZE keeps 3 parameters as they were drawn at random" in caplog.text
    frozen.train()
    weights = ("MODEL.WEIGHTS", str(tmp_path / "a/model_final.pth"))
    frozen = trainer("b", False, "SOLVER.FREEZE", "['head.cls_tower']", *weights)
    caplog.clear()
    train.warn_of_what_starts_anew(frozen)
    assert "drawn at random" not in caplog.text


def with_aps(trainer: Trainer, aps: list[float]) -> Trainer:
    """Evaluations that give `aps`, one after the other."""
    results = iter(aps)
    trainer.test = lambda cfg, model: {"bbox": {"AP": next(results)}}
    return trainer


EVERY = ("TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "12", "SOLVER.PATIENCE", "2")


def test_training_stops_where_no_better_evaluation_comes(trainer, tmp_path):
    stopped = with_aps(trainer("a", False, *EVERY), [10.0, 30.0, 20.0, 30.0, 40.0])
    stopped.train()
    assert stopped.iterations == 8
    assert stopped.best.record() == {
        "best": {"AP": 30.0, "iterations": 4},
        "stopped_early_after": 8,
    }
    assert stopped.results == {"bbox": {"AP": 30.0}}
    final, best = (read(tmp_path / f"a/model_{name}.pth") for name in ("final", "best"))
    assert final["iteration"] == 7 and best["iteration"] == 3
    assert (tmp_path / "a/last_checkpoint").read_text() == "model_final.pth"
    assert not torch.equal(*(x["model"]["head.cls_pred.weight"] for x in (final, best)))
    lines = [json.loads(x) for x in (tmp_path / "a/metrics.json").read_text().splitlines()]
    assert lines[-1]["bbox/AP"] == 30.0

    again = with_aps(trainer("a", True, *EVERY), [])  # over already: nothing is trained
    again.train()
    assert again.best.record()["stopped_early_after"] == 8
    more = with_aps(trainer("a", True, *EVERY, "SOLVER.PATIENCE", "3"), [35.0, 31.0])
    more.train()
    assert more.iterations == 12
    assert more.best.record() == {
        "best": {"AP": 35.0, "iterations": 10},
        "stopped_early_after": None,
    }


@pytest.mark.parametrize("patience, iterations", [("1", 6), ("0", 12)])
def test_test_images_are_augmented_once_whenever_training_ends(trainer, patience, iterations):
    keys = (*EVERY, "SOLVER.PATIENCE", patience, "TEST.AUG.ENABLED", "True")
    run = with_aps(trainer("a", False, *keys), [10.0, 30.0, 20.0, 5.0, 5.0, 5.0])
    calls = []
    run.test_with_TTA = lambda cfg, model: calls.append(run.iterations) or {"bbox_TTA": {"AP": 1.0}}
    run.train()
    assert calls == [iterations] and run.iterations == iterations
    assert run.results["bbox_TTA"] == {"AP": 1.0} and "bbox" in run.results


def test_the_last_evaluation_may_be_the_best_one(trainer, tmp_path):
    keys = ("TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "4")
    run = with_aps(trainer("a", False, *keys), [10.0, 20.0])
    run.train()
    best, final = (read(tmp_path / f"a/model_{name}.pth") for name in ("best", "final"))
    assert best["iteration"] == final["iteration"] == best["trainer"]["iteration"] == 3
    assert best["trainer"]["data"] == final["trainer"]["data"]
    assert_same(best["model"], final["model"])
    assert run.best.record()["stopped_early_after"] is None


def test_without_evaluations_there_is_no_best(trainer, tmp_path):
    run = with_aps(trainer("a", False, "SOLVER.MAX_ITER", "1"), [10.0])
    run.train()
    assert run.best is None and not (tmp_path / "a/model_best.pth").exists()


def test_the_best_has_the_averaged_weights(trainer, tmp_path):
    keys = (*EMA, "TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "3")
    run = with_aps(trainer("a", False, *keys), [10.0, 5.0])
    kept = []
    test = run.test

    def keep(cfg, model):
        kept.append({name: x.clone() for name, x in model.state_dict().items()})
        return test(cfg, model)

    run.test = keep
    run.train()
    assert_same(read(tmp_path / "a/model_best.pth")["model"], kept[0])
