from __future__ import annotations

import copy
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from iou_d2.engine import checkpoint
from iou_d2.engine.checkpoint import AtomicCheckpointer, ReadCheckpointer


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


def test_a_checkpoint_holds_model_parts_and_extras(tmp_path):
    model, other = nn.Linear(2, 3), nn.Linear(1, 1)
    AtomicCheckpointer(model, str(tmp_path), extra={"class_names": ["a"]}, other=other).save(
        "model_1", iteration=7
    )
    saved = torch.load(tmp_path / "model_1.pth", weights_only=True)
    assert saved["class_names"] == ["a"] and saved["iteration"] == 7
    assert torch.equal(saved["model"]["weight"], model.weight)
    assert torch.equal(saved["other"]["bias"], other.bias)
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"


def test_a_crash_while_writing_leaves_the_good_checkpoint(tmp_path, monkeypatch):
    checkpointer = AtomicCheckpointer(nn.Linear(2, 3), str(tmp_path))
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
    AtomicCheckpointer(nn.Linear(2, 3)).save("model_1")
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
    ReadCheckpointer(ours, copy.deepcopy(content)).load(str(tmp_path / name))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    assert torch.equal(ours.conv.weight, source.conv.weight)
