"""Training in two processes, of which one has no object: every loss still touches every parameter,
and divisors are means over the processes."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling import build_model

from point_detector_by_hand import CONFIGS, SMALL
from processes import two_steps

UNITBOX = "configs/quick/unitbox_shapes.yaml"
IOU_AWARE = "configs/iou_retinanet_R_50_FPN_1x.yaml"
IOU_NET = "configs/quick/iou_net_shapes.yaml"


def assert_finite(steps) -> None:
    assert all(math.isfinite(x) for step in steps for x in step.values())


def assert_same(state, other, prefix: str) -> None:
    names = [name for name in state if name.startswith(prefix)]
    assert names and all(torch.equal(state[name], other[name]) for name in names)


def test_point_detectors(small_cfg, make_batch, tmp_path):
    cfgs = [small_cfg(CONFIGS[name], *SMALL) for name in ("vfnet", "atss")]
    batches = [make_batch([3]), make_batch([0])]
    trained = two_steps(cfgs, batches, tmp_path, lr=0.01)
    for cfg, ((first, state), (second, other)) in zip(cfgs, trained):
        assert_finite(first + second)
        assert first[0]["loss_box"] > 0 and second[0]["loss_box"] == 0
        assert_same(state, other, "head.cls_pred.weight")

        torch.manual_seed(0)
        alone = build_model(cfg).train()(batches[0])
        # Half of the positive points a process, so twice the losses of one process.
        expected = {name: 2 * loss.item() for name, loss in alone.items()}
        assert first[0] == pytest.approx(expected, rel=1e-4)


def test_iou_aware_retinanet(small_cfg, make_batch, tmp_path):
    batches = [make_batch([3]), make_batch([0])]
    cfg = small_cfg(IOU_AWARE)
    (first, state), (second, other) = two_steps([cfg], batches, tmp_path, lr=0.01)[0]
    assert_finite(first + second)
    assert first[1]["loss_iou"] > 0 and second[1]["loss_iou"] == 0
    assert_same(state, other, "head.iou_pred.weight")


def test_iou_net(small_cfg, make_batch, tmp_path):
    cfg = small_cfg(IOU_NET, "MODEL.ROI_HEADS.NUM_CLASSES", "3")
    batches = [make_batch([3]), make_batch([0])]
    (first, state), (second, other) = two_steps([cfg], batches, tmp_path, lr=0.001)[0]
    assert_finite(first + second)
    assert first[1]["loss_iou"] > 0 and second[1]["loss_iou"] == 0
    assert_same(state, other, "roi_heads.iou_branch.")


def test_unitbox(small_cfg, make_batch, tmp_path):
    batches = [make_batch([3], 1), make_batch([0], 1, side=160)]
    cfg = small_cfg(UNITBOX)
    (first, state), (second, other) = two_steps([cfg], batches, tmp_path, lr=0.01)[0]
    assert_finite(first + second)
    assert first[1]["loss_box"] > 0 and second[1]["loss_box"] == 0
    assert_same(state, other, "head.box.weight")

    torch.manual_seed(0)
    model = build_model(cfg).train()
    alone, empty = model(batches[0]), model(batches[1])
    # The two processes together have as many positive pixels as the first, on average half of them.
    assert first[0]["loss_box"] == pytest.approx(2 * alone["loss_box"].item(), rel=1e-4)
    mean = (96**2 + 160**2) / 2
    for found, own, side in zip((first, second), (alone, empty), (96, 160)):
        expected = own["loss_confidence"].item() * side**2 / mean
        assert found[0]["loss_confidence"] == pytest.approx(expected, rel=1e-4)


def test_multibox_detectors(small_cfg, make_batch, tmp_path):
    batches = [make_batch([3]), make_batch([0])]
    names = ("ssd_iou_shapes", "refinedet_shapes")
    cfgs = [small_cfg(f"configs/quick/{name}.yaml") for name in names]
    trained = two_steps(cfgs, batches, tmp_path, lr=0.001)
    for cfg, ((first, state), (second, other)) in zip(cfgs, trained):
        assert_finite(first + second)
        assert not any(second[0].values())
        for prefix in ("head.", "backbone."):
            names = [x for x in state if x.startswith(prefix) and x.endswith("weight")]
            assert names and all(torch.equal(state[x], other[x]) for x in names)

        torch.manual_seed(0)
        alone = build_model(cfg).train()(batches[0])
        # Half of the positive boxes a process, so twice the losses of one process.
        expected = {name: 2 * loss.item() for name, loss in alone.items()}
        assert first[0] == pytest.approx(expected, rel=1e-4)
