"""demo.py as a user runs it, and what `iou-d2 detect` makes of checkpoints."""

from __future__ import annotations

import json
import pickle

import cv2
import numpy as np
import pytest
import torch
import yaml

from command_line import command, run
from iou_d2 import get_config
from iou_d2.commands import detect, pictures
from iou_d2.commands.trained import TrainedDetector, open_trained, setup
from iou_d2.engine.checkpoint import untrained_predictor
from iou_d2.errors import InputError


def demo(environment, folder, source: list[str], output, fails: bool = False) -> str:
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    arguments = (*source, "--output", str(output), "--confidence-threshold", "0", *weights)
    arguments = (*arguments, "INPUT.MIN_SIZE_TEST", "64")
    return run(environment, command(*arguments, script="demo.py"), fails=fails)


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


CLASSES = ["cat", "dog", "cow"]
SMALL = (
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "8", "MODEL.FPN.OUT_CHANNELS", "64"),
    *("MODEL.RETINANET.NUM_CLASSES", "3", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
)
CONFIG = "configs/quick/retinanet_shapes.yaml"


@pytest.fixture
def state():
    """The weights of a RetinaNet of three classes."""
    torch.manual_seed(0)
    return untrained_predictor(get_config(CONFIG, SMALL)).model.state_dict()


def write(path, content) -> str:
    if path.suffix == ".pth":
        torch.save(content, path)
    else:
        arrays = {name: weight.numpy() for name, weight in content["model"].items()}
        path.write_bytes(pickle.dumps({**content, "model": arrays}))
    return str(path)


@pytest.mark.filterwarnings("error:The given NumPy array")
@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_one_read_of_the_checkpoint_gives_names_and_weights(tmp_path, monkeypatch, state, name):
    content = {"model": state, "__author__": "iou_d2", "class_names": CLASSES}
    weights = write(tmp_path / name, content)
    cfg, checkpoint = setup(CONFIG, [*SMALL, "MODEL.WEIGHTS", weights])
    assert cfg.MODEL.CLASS_NAMES == CLASSES
    for reader in (torch, pickle):
        monkeypatch.setattr(reader, "load", None)
    detector = TrainedDetector(cfg, checkpoint)
    loaded = detector.predictor.model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    _, detections = detect.Demo(detector, CLASSES, 0.0)(np.full((64, 64, 3), 90, dtype=np.uint8))
    assert detections and {d["class"] for d in detections} <= set(CLASSES)


def test_classes_without_names_are_called_by_their_number(tmp_path):
    config, overrides = "configs/quick/unitbox_shapes.yaml", ["MODEL.DEVICE", "cpu"]
    torch.manual_seed(0)
    model = untrained_predictor(get_config(config, overrides)).model
    weights = write(tmp_path / "model.pth", {"model": model.state_dict()})
    demo = detect.Demo(*open_trained(config, [*overrides, "MODEL.WEIGHTS", weights]), 0.0)
    assert [demo.class_name(index) for index in range(2)] == ["class 0", "class 1"]


def test_the_number_of_names_is_that_of_the_heads(tmp_path, state):
    weights = write(tmp_path / "model.pth", {"model": state, "class_names": CLASSES})
    cfg, _ = setup("configs/quick/unitbox_shapes.yaml", ["MODEL.WEIGHTS", weights])
    numbers = [cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES]
    assert numbers == [3, 3]


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    weights = tmp_path / "model.pkl"
    weights.write_bytes(pickle.dumps({"model": {}, "class_names": print}))
    with pytest.raises(ValueError, match="is refused, and nothing in it was run"):
        setup(CONFIG, ["MODEL.WEIGHTS", str(weights)])


def test_equal_names_are_told_apart():
    names = ["x.png", "x.png", "x_2.png", "y.png", "x.jpg"]
    assert pictures.unlike_names(names) == ["x.png", "x_2.png", "x_2_2.png", "y.png", "x.jpg"]


def test_pairs_may_follow_the_pictures(tmp_path, state):
    cv2.imwrite(str(tmp_path / "A.B.PNG"), np.full((48, 64, 3), 90, dtype=np.uint8))
    weights = write(tmp_path / "model.pth", {"model": state, "class_names": CLASSES})
    arguments = ["--config", CONFIG, "--input", str(tmp_path / "A.B.PNG"), *SMALL]
    arguments += ["MODEL.WEIGHTS", weights, "--output", str(tmp_path / "out")]
    detect.main([*arguments, "--confidence-threshold", "0"])
    (record,) = json.loads((tmp_path / "out/detections.json").read_text())
    assert record["file"].endswith("A.B.PNG") and record["detections"]


def test_tensors_with_other_beginnings_of_names_are_matched_where_one_says_so(tmp_path, state):
    short = {name.removeprefix("backbone."): value for name, value in state.items()}
    weights = write(tmp_path / "model.pth", {"model": short})
    with pytest.raises(InputError, match="are not, such as backbone"):
        open_trained(CONFIG, [*SMALL, "MODEL.WEIGHTS", weights])
    weights += "?matching_heuristics=True"
    detector, _ = open_trained(CONFIG, [*SMALL, "MODEL.WEIGHTS", weights])
    loaded = detector.predictor.model.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def detect_in(folder, state, *sources: str) -> None:
    weights = write(folder / "model.pth", {"model": state, "class_names": CLASSES})
    where = ["--input", *(str(folder / x) for x in sources), "--output", str(folder / "out")]
    detect.main([*where, "--config", CONFIG, *SMALL, "MODEL.WEIGHTS", weights])


def test_a_bad_picture_is_reported_and_the_others_are_drawn(tmp_path, state):
    grey = np.full((48, 64, 3), 90, dtype=np.uint8)
    for name in ("a.png", "c.jpg"):
        cv2.imwrite(str(tmp_path / name), grey)
    good = (tmp_path / "c.jpg").read_bytes()
    cv2.imwrite(str(tmp_path / "thin.png"), np.full((1, 5000, 3), 90, dtype=np.uint8))
    for name, content in {"d.jfif": good, "e": good, "cut.jpg": good[:300], "f.png": b""}.items():
        (tmp_path / name).write_bytes(content)
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((48, 64), 9000, dtype=np.uint16))
    cv2.imwrite(str(tmp_path / "deep3.png"), np.full((48, 64, 3), 9000, dtype=np.uint16))
    with pytest.raises(SystemExit) as ended:
        names = "f.png a.png cut.jpg c.jpg deep.png deep3.png thin.png d.jfif e".split()
        detect_in(tmp_path, state, *names)
    faults = ended.value.code.splitlines()
    assert ["f.png", "cut.jpg", "deep.png", "deep3.png"] == [
        next(word for word in fault.split() if word.startswith(str(tmp_path))).split("/")[-1]
        for fault in faults
    ]
    records = json.loads((tmp_path / "out/detections.json").read_text())
    read = ["a.png", "c.jpg", "thin.png", "d.jfif", "e"]
    assert [r["file"].split("/")[-1] for r in records] == read
    drawn = {"a.png", "c.jpg", "thin.png", "d.png", "e.png", "detections.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == drawn


def test_what_was_found_until_an_interruption_is_kept(tmp_path, state, monkeypatch):
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), np.full((48, 64, 3), 90, dtype=np.uint8))

    def interrupted(path):
        if path.endswith("b.png"):
            raise KeyboardInterrupt
        return np.full((48, 64, 3), 90, dtype=np.uint8)

    monkeypatch.setattr(detect, "read_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detect_in(tmp_path, state, "a.png", "b.png")
    assert len(json.loads((tmp_path / "out/detections.json").read_text())) == 1


def test_weights_of_another_model_are_refused(tmp_path, state):
    part = {name: value for name, value in state.items() if "bbox" not in name}
    cv2.imwrite(str(tmp_path / "a.png"), np.full((48, 64, 3), 90, dtype=np.uint8))
    with pytest.raises(InputError, match="are not, such as head.bbox"):
        detect_in(tmp_path, part, "a.png")
