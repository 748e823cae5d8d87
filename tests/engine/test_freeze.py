from __future__ import annotations

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from iou_d2.engine.checkpoint import SafeCheckpointer
from iou_d2.engine.freeze import freeze
from iou_d2.engine.solver import build_solver
from iou_d2.errors import InputError
from processes import spawn_cpu


@pytest.fixture
def small(small_cfg):
    cfg = small_cfg("quick/retinanet_shapes", "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN")
    torch.manual_seed(0)
    return build_model(cfg), cfg


def step(model, cfg, batch) -> None:
    optimizer = build_solver(cfg, model)
    model.train()
    with EventStorage():
        sum(model(batch).values()).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "names",
    [["backbone"], ["backbone.bottom_up"], ["head.cls_subnet"], ["backbone.bottom_up", "head"]],
)
def test_a_frozen_part_stays_bit_for_bit_and_all_else_moves(small, make_batch, names):
    """Parameters and the statistics of batch norm alike."""
    model, cfg = small
    frozen = freeze(model, names)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    step(model, cfg, make_batch([2, 1], side=96))
    after = model.state_dict()
    assert before.keys() == after.keys()
    kept = {n for n in before if any(n.startswith(f"{name}.") for name in names)}
    assert set(frozen) <= kept
    for name, x in before.items():
        if name in kept:
            assert torch.equal(x, after[name]), name
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    learns = {name for name, x in model.named_parameters() if x.requires_grad}
    assert moved >= learns and learns.isdisjoint(kept)
    if "backbone" not in names:
        statistics = "backbone.fpn_lateral3.norm.running_mean"
        assert statistics in moved


def test_without_names_nothing_changes(small):
    model, _ = small
    before = str(model)
    assert freeze(model, []) == [] and str(model) == before
    assert all(x.requires_grad for name, x in model.named_parameters() if "head" in name)


def test_a_name_of_one_weight_or_of_one_norm(small):
    model, _ = small
    assert freeze(model, ["head.cls_score.weight"]) == ["head.cls_score.weight"]
    assert model.head.cls_score.bias.requires_grad
    norm = model.backbone.fpn_lateral3.norm
    assert isinstance(norm, nn.BatchNorm2d)
    freeze(model, ["backbone.fpn_lateral3.norm.weight"])
    assert model.backbone.fpn_lateral3.norm is norm
    freeze(model, ["backbone.fpn_lateral3.norm"])
    assert isinstance(model.backbone.fpn_lateral3.norm, FrozenBatchNorm2d)


def test_names_are_whole_parts(small):
    """ "backbone.fpn_lateral3" is no beginning of "backbone.fpn_lateral30"."""
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "ab": nn.Linear(1, 1)})
    freeze(model, ["a"])
    assert [name for name, x in model.named_parameters() if x.requires_grad] == [
        "ab.weight",
        "ab.bias",
    ]


def test_a_frozen_norm_takes_statistics_from_a_file_and_gives_them_back(tmp_path):
    source = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    source.train()(torch.randn(2, 3, 5, 5))
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    freeze(model, ["0", "1"])
    checkpointer = SafeCheckpointer(model, str(tmp_path))
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.mismatch.is_whole
    assert {"1.running_mean", "1.weight", "0.weight"} <= checkpointer.filled
    images = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model.train()(images), source.eval()(images))
    checkpointer.save("b")
    again = SafeCheckpointer(source)
    again.load(str(tmp_path / "b.pth"))
    assert again.mismatch.is_whole


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["bakbone"], "SOLVER.FREEZE names 'bakbone', .* nearest names are backbone"),
        (["backbone."], "names 'backbone.', .* nearest names are backbone"),
        (["backbone", "head.cls_sore"], "names 'head.cls_sore', .*head.cls_score"),
        (["module.backbone"], "no parameter of the model begins so"),
        (["x" * 100_000], "SOLVER.FREEZE names 'xxx"),
        (["backbone", "head"], "leaves no parameter to learn"),
    ],
)
def test_names_that_freeze_nothing_or_all_are_refused(small, names, sentence):
    model, _ = small
    with pytest.raises(InputError, match=sentence) as error:
        freeze(model, names)
    assert len(str(error.value)) < 600


def _two_steps(rank: int, cfg, batches, folder) -> None:
    torch.manual_seed(rank)
    model = build_model(cfg)
    freeze(model, ["backbone.bottom_up", "head.bbox_subnet"])
    model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    for _ in range(2):  # the second one hangs or raises where a gradient has not come
        step(model, cfg, batches[rank])
    torch.save(model.module.state_dict(), folder / f"{rank}.pth")


def test_two_processes_wait_for_no_frozen_gradient(small, make_batch, tmp_path):
    _, cfg = small
    spawn_cpu(_two_steps, 2, cfg, [make_batch([1]), make_batch([0])], tmp_path)
    states = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    for name, x in states[0].items():
        if "norm.running" not in name:  # those of unfrozen norms are those of a process
            assert torch.equal(x, states[1][name]), name
