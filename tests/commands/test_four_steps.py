"""The recipe of docs/FOUR_STEP_RPN.md: two iterations a step on six images of 64 px."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml

from command_line import command, run
from iou_d2.commands.trained import setup
from iou_d2.errors import InputError

CONFIG = "configs/quick/faster_rcnn_shapes.yaml"
TRAIN, TEST = "shapes_train_6x64", "shapes_val_4x64"
COMMON = (
    *("DATASETS.TRAIN", f"('{TRAIN}',)", "DATASETS.TEST", f"('{TEST}',)"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SEED", "1"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"),
    *("SOLVER.WARMUP_ITERS", "0", "TEST.EXPECTED_RESULTS", "[]"),
)
PARTS = ("backbone", "proposal_generator", "roi_heads")


@pytest.fixture(scope="module")
def steps(environment, tmp_path_factory):
    """The folders of the four runs, by number, and what step 3 printed."""
    out = tmp_path_factory.mktemp("steps")
    folders = {step: out / str(step) for step in (1, 2, 3, 4)}
    weights = {step: str(folder / "model_final.pth") for step, folder in folders.items()}

    def train(step: int, *keys: str) -> str:
        folder = ("OUTPUT_DIR", str(folders[step]))
        return run(environment, command(*COMMON, *folder, *keys, config=CONFIG))

    train(1, "MODEL.META_ARCHITECTURE", "ProposalNetwork")
    saved = str(folders[1] / "config.yaml")
    sets = ("DATASETS.TEST", f"('{TRAIN}', '{TEST}')", "MODEL.RPN.POST_NMS_TOPK_TEST", "2000")
    evaluation = ("--eval-only", "MODEL.WEIGHTS", weights[1], *sets)
    printed = run(environment, command(*evaluation, config=saved))
    files = [folders[1] / "inference" / name / "box_proposals.pkl" for name in (TRAIN, TEST)]
    for images, file in zip((6, 4), files):
        assert f"Saved the proposals of {images} images to {file}" in printed
    keys = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", "MODEL.LOAD_PROPOSALS", "True")
    for split, file in zip(("TRAIN", "TEST"), files):
        keys += (f"DATASETS.PROPOSAL_FILES_{split}", f"('{file}',)")
    train(2, *keys)
    of_step_3 = train(3, "MODEL.WEIGHTS", weights[2], "SOLVER.FREEZE", "['backbone', 'roi_heads']")
    frozen = "['backbone', 'proposal_generator']"
    train(4, "MODEL.WEIGHTS", weights[3], "SOLVER.FREEZE", frozen)
    return folders, of_step_3


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By part of the model, without counters."""
    model = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    return {
        part: {x: v for x, v in model.items() if x.startswith(part) and "num_batches" not in x}
        for part in PARTS
    }


def is_same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[x], other[x]) for x in one)


def test_each_step_trains_its_parts_and_keeps_the_others(steps):
    models = {step: tensors_of(folder) for step, folder in steps[0].items()}
    has = {step: [part for part in PARTS if model[part]] for step, model in models.items()}
    assert has[1] == ["backbone", "proposal_generator"] and has[2] == ["backbone", "roi_heads"]
    assert has[3] == has[4] == list(PARTS)
    # Steps 1 and 2 learn backbones of their own, which 3 and 4 share.
    assert not is_same(models[1]["backbone"], models[2]["backbone"])
    assert is_same(models[2]["backbone"], models[3]["backbone"])
    assert is_same(models[2]["backbone"], models[4]["backbone"])
    assert is_same(models[2]["roi_heads"], models[3]["roi_heads"])
    assert is_same(models[3]["proposal_generator"], models[4]["proposal_generator"])
    for before, after, part in ((1, 3, "proposal_generator"), (3, 4, "roi_heads")):
        old, new = models[before][part], models[after][part]
        assert old.keys() == new.keys() and len(old) > 5
        assert not any(torch.equal(old[x], new[x]) for x in old), part


def test_logs_have_the_losses_of_what_learns(steps):
    folders, of_step_3 = steps
    names = {}
    for step, folder in folders.items():
        lines = [json.loads(x) for x in (folder / "metrics.json").read_text().splitlines()]
        names[step] = {x for line in lines for x in line if x.startswith("loss_")}
    rpn, heads = {"loss_rpn_cls", "loss_rpn_loc"}, {"loss_cls", "loss_box_reg"}
    assert names == {1: rpn, 2: heads, 3: rpn | heads, 4: rpn | heads}
    assert "starts anew" in of_step_3 and "proposal_generator" in of_step_3


def test_files_hold_the_proposals_of_the_rpn(steps):
    folder = steps[0][1]
    for name, images in ((TRAIN, 6), (TEST, 4)):
        with open(folder / "inference" / name / "box_proposals.pkl", "rb") as file:
            content = pickle.load(file)
        assert len(content["ids"]) == images
        for boxes, logits in zip(content["boxes"], content["objectness_logits"]):
            assert 0 < len(boxes) == len(logits) <= 2000 and boxes.shape[1] == 4
            assert boxes.min() >= 0 and boxes.max() <= 64
            assert (boxes[:, 2:] > boxes[:, :2]).all()
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    assert 0 <= results[f"{TRAIN}/box_proposals/AR@100"] <= 100


def test_the_last_step_leaves_a_detector_like_any_other(steps, environment, tmp_path):
    folders, _ = steps
    arguments = ["--input", str(picture(environment)), "--output", str(tmp_path)]
    run(environment, detect(folders[4], *arguments, "--confidence-threshold", "0.0"))
    (record,) = json.loads((tmp_path / "detections.json").read_text())
    assert record["detections"]


def picture(environment) -> Path:
    folder = Path(environment["DETECTRON2_DATASETS"]) / "shapes" / TEST
    return sorted(folder.rglob("*.png"))[0]


def detect(folder: Path, *arguments: str) -> list[str]:
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    config = str(folder / "config.yaml")
    return command(*arguments, *weights, script="demo.py", config=config)


@pytest.mark.parametrize(
    ("step", "sentence"),
    [(1, "ProposalNetwork proposes boxes of no class"), (2, "a picture has no proposals")],
)
def test_half_a_detector_detects_nothing_in_a_picture(steps, step, sentence):
    folder = steps[0][step]
    keys = ["MODEL.WEIGHTS", str(folder / "model_final.pth"), "MODEL.DEVICE", "cpu"]
    with pytest.raises(InputError, match=sentence):
        setup(str(folder / "config.yaml"), keys)


def test_the_page_names_keys_that_there_are(steps):
    page = Path("docs/FOUR_STEP_RPN.md").read_text()
    saved = yaml.safe_load((steps[0][2] / "config.yaml").read_text())
    words = {word.strip('`",()') for word in page.split()}
    keys = [word for word in words if word.split(".")[0] in ("MODEL", "SOLVER", "DATASETS", "TEST")]
    assert len(keys) > 9
    for key in keys:
        node = saved
        for part in key.split("."):
            assert part in node, key
            node = node[part]
