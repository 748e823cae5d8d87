from __future__ import annotations

import copy
import errno
import pickle
import resource
import signal

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from iou_d2 import get_config
from iou_d2.engine import checkpoint
from iou_d2.engine.checkpoint import (
    SafeCheckpointer,
    build_predictor,
    remove_unfinished,
    untrained_predictor,
)
from iou_d2.errors import InputError, MissingFileError


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


def test_a_checkpoint_holds_model_parts_and_extras(tmp_path):
    model, other = nn.Linear(2, 3), nn.Linear(1, 1)
    SafeCheckpointer(model, str(tmp_path), extra={"class_names": ["a"]}, other=other).save(
        "model_1", iteration=7
    )
    saved = torch.load(tmp_path / "model_1.pth", weights_only=True)
    assert saved["class_names"] == ["a"] and saved["iteration"] == 7
    assert torch.equal(saved["model"]["weight"], model.weight)
    assert torch.equal(saved["other"]["bias"], other.bias)
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"


def test_a_crash_while_writing_leaves_the_good_checkpoint(tmp_path, monkeypatch):
    checkpointer = SafeCheckpointer(nn.Linear(2, 3), str(tmp_path))
    checkpointer.save("model_1")
    good = (tmp_path / "model_1.pth").read_bytes()

    def die_half_way(data, file):
        file.write(good[: len(good) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", die_half_way)
    for name in ("model_1", "model_2"):
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save(name)
    assert (tmp_path / "model_1.pth").read_bytes() == good
    assert not (tmp_path / "model_2.pth").exists()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_1.pth")


def test_nothing_is_saved_where_no_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SafeCheckpointer(nn.Linear(2, 3)).save("model_1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_what_was_read_is_loaded_as_detectron2_loads_the_file(tmp_path, name, wrapped):
    """Detectron2 is the oracle, also for a .pkl that it takes for one of Caffe2."""
    source, ours, theirs = (Backbone() for _ in range(3))
    weights = source.state_dict()
    if name.endswith(".pkl"):
        weights = {key: value.numpy() for key, value in weights.items()}
    content = {"model": weights, "__author__": "somebody"} if wrapped else weights
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    DetectionCheckpointer(theirs).load(str(tmp_path / name))
    SafeCheckpointer(ours, content=copy.deepcopy(content)).load(str(tmp_path / name))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    assert torch.equal(ours.conv.weight, source.conv.weight)


def test_a_full_disk_is_one_error_and_leaves_the_last_whole_checkpoint(tmp_path):
    """The limit of a file's size stands for the disk: the kernel refuses what is beyond."""
    checkpointer = SafeCheckpointer(nn.Linear(2, 3), str(tmp_path))
    checkpointer.save("model_1")
    checkpointer.model = nn.Linear(1000, 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            checkpointer.save("model_2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG and raised.value.__suppress_context__
    assert raised.value.filename == str(tmp_path / "model_2.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_1.pth"]
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_1.pth")


def test_what_killed_runs_left_is_removed(tmp_path):
    SafeCheckpointer(nn.Linear(2, 3), str(tmp_path)).save("model_1")
    (tmp_path / "model_2.pth.17.unfinished").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_1.pth"]


def test_what_does_not_fit_the_model_is_told(tmp_path):
    content = {"weight": torch.zeros(4, 2), "other": torch.zeros(1)}
    torch.save(content, tmp_path / "a.pth")
    checkpointer = SafeCheckpointer(nn.Linear(2, 3))
    checkpointer.load(str(tmp_path / "a.pth"))
    found = checkpointer.mismatch
    assert (found.loaded, found.missing, found.unexpected) == (0, ("bias",), ("other",))
    assert found.other_shapes == (("weight", (4, 2), (3, 2)),) and not found.is_whole
    for part in ("a.pth", "such as bias", r"(4, 2) in the file and (3, 2)", "such as other"):
        assert part in found.sentence()
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "a.pth")
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.mismatch.is_whole and checkpointer.mismatch.loaded == 2


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"model": 3}, "model in .*a.pth is a int and not a dict"),
        ({"model": {"weight": "x"}}, "weight in .*a.pth is a str and not a tensor"),
        ({"model": {3: torch.zeros(1)}}, "has the key 3, which is no name"),
        ({"weight": torch.zeros(3, 2, dtype=torch.complex64)}, "weight in .*a.pth is complex"),
        ({"weight": torch.zeros(3, 2, device="meta")}, "a.pth"),
    ],
)
def test_what_is_no_weight_is_refused(tmp_path, content, sentence):
    torch.save(content, tmp_path / "a.pth")
    checkpointer = SafeCheckpointer(nn.Linear(2, 3))
    for _ in range(2):  # an error does not stand in the way of the next load
        with pytest.raises(InputError, match=sentence):
            checkpointer.load(str(tmp_path / "a.pth"))
    with pytest.raises(MissingFileError, match="There is no file .*none.pth"):
        checkpointer.load(str(tmp_path / "none.pth"))


def test_weights_that_are_not_finite_are_told(tmp_path, caplog):
    torch.save({"weight": torch.full((3, 2), float("nan"))}, tmp_path / "a.pth")
    SafeCheckpointer(nn.Linear(2, 3)).load(str(tmp_path / "a.pth"))
    assert "1 tensors are not finite, such as weight" in caplog.text


def test_matching_names_can_be_asked_for(tmp_path):
    """The names of the model have a prefix that the file lacks; Detectron2 main reads it so."""
    source = Backbone()
    torch.save(source.conv.state_dict(), tmp_path / "a.pth")
    ours = Backbone()
    SafeCheckpointer(ours).load(f"{tmp_path}/a.pth?matching_heuristics=True")
    assert torch.equal(ours.conv.weight, source.conv.weight)


def test_a_predictor_runs_nothing_of_its_weights(tmp_path):
    cfg = get_config("quick/vfnet_own_data", ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.WEIGHTS = ""
    weights = build_predictor(cfg).model.state_dict()
    torch.save({"model": weights}, tmp_path / "good.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "good.pth")
    predictor = build_predictor(cfg)
    assert all(torch.equal(v, weights[k]) for k, v in predictor.model.state_dict().items())
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "bad.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "bad.pth")
    with pytest.raises(InputError, match="bad.pth is refused.*torch.nn.modules.linear.Linear"):
        build_predictor(cfg)


def test_a_file_of_another_model_loads_nothing(tmp_path):
    """Not even the numbers of batches of its norms, which a file without metadata need not have."""
    torch.save({"other": torch.zeros(1)}, tmp_path / "a.pth")
    model = nn.Sequential(nn.BatchNorm2d(2))
    checkpointer = SafeCheckpointer(model)
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.mismatch.loaded == 0 and len(checkpointer.mismatch.missing) == 4


def test_a_tensor_with_two_names_is_not_missing(tmp_path):
    part = nn.Linear(2, 3)
    torch.save({"0.weight": part.weight, "0.bias": part.bias}, tmp_path / "a.pth")
    checkpointer = SafeCheckpointer(nn.Sequential(nn.Linear(2, 3), nn.Identity()))
    checkpointer.model.add_module("again", checkpointer.model[0])
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.mismatch.is_whole


def test_the_predictor_resizes_as_the_mapper_of_tests_does():
    cfg = get_config("quick/ssd_shapes", ["MODEL.DEVICE", "cpu"])
    predictor = untrained_predictor(cfg)
    image = np.zeros((40, 90, 3), dtype=np.uint8)
    assert predictor.aug.get_transform(image).apply_image(image).shape == (128, 128, 3)
    found = predictor(image)["instances"]
    assert found.image_size == (40, 90)
