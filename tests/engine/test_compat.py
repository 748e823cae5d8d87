from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from iou_d2.engine import compat
from iou_d2.engine.compat import AtomicCheckpointer, ResumableTrainer


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

    monkeypatch.setattr(compat.torch, "save", die_half_way)
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


def test_an_optimizer_of_other_parameters_is_refused_with_a_way_out():
    trainer = ResumableTrainer.__new__(ResumableTrainer)
    trainer._hooks = []
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    one_group = torch.optim.SGD(weights, lr=0.1)
    two_groups = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1)
    trainer._trainer = SimpleNamespace(optimizer=one_group)
    with pytest.raises(ValueError, match="Detectron2 version .* that began the run"):
        trainer.load_state_dict(
            {"iteration": 3, "_trainer": {"optimizer": two_groups.state_dict()}}
        )


def test_a_checkpoint_without_optimizer_is_refused_with_a_way_out():
    trainer = ResumableTrainer.__new__(ResumableTrainer)
    trainer._hooks = []
    with pytest.raises(KeyError, match="holds no optimizer state.*MODEL.WEIGHTS"):
        trainer.load_state_dict({"iteration": 3})
