from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from iou_d2 import get_config
from iou_d2.engine import precision
from iou_d2.engine.config_checks import check_config
from iou_d2.engine.precision import as_float32, compute_in_bfloat16, networks_of, with_precision
from iou_d2.engine.trainer import Trainer

CONFIGS = (
    "retinanet_shapes iou_retinanet_shapes vfnet_shapes atss_shapes fcos_shapes unitbox_shapes "
    "ssd_shapes ssd_iou_shapes refinedet_shapes faster_rcnn_shapes iou_net_shapes"
).split()


def build(config: str, *overrides: str) -> nn.Module:
    cfg = get_config(f"quick/{config}", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *overrides])
    torch.manual_seed(0)
    return Trainer.build_model(cfg)


def losses_of(model: nn.Module, batch: list[dict]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    with EventStorage():
        return model.train()(batch)


def layouts_of_convolutions(model: nn.Module) -> list[bool]:
    """Of each input that is larger than one cell, and has more than one channel, whether it is
    channels-last; filled as the model runs."""
    seen = []

    def look(conv, inputs):
        if inputs[0].shape[1] > 1 and inputs[0][0, 0].numel() > 1:
            seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(look)
    return seen


@pytest.mark.parametrize("config", CONFIGS)
def test_networks_compute_in_bfloat16_and_all_else_in_float32(config, make_batch):
    batch = make_batch([2, 1], side=64)
    precise, mixed = build(config), build(config, "MODEL.PRECISION", "bfloat16")
    assert list(precise.state_dict()) == list(mixed.state_dict())
    dtypes = []
    for network in networks_of(mixed):
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, inputs, y: dtypes.append(y.dtype))
    wanted, found = losses_of(precise, batch), losses_of(mixed, batch)
    assert set(dtypes) == {torch.bfloat16}
    assert {loss.dtype for loss in found.values()} == {torch.float32}
    wanted, found = ({k: x.item() for k, x in losses.items()} for losses in (wanted, found))
    assert all(map(math.isfinite, found.values())) and found != wanted
    assert sum(found.values()) == pytest.approx(sum(wanted.values()), rel=0.05)
    assert not torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        for output in mixed.eval()(batch):
            fields = output["instances"].get_fields()
            assert fields["pred_boxes"].tensor.dtype == fields["scores"].dtype == torch.float32


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_a_processor_without_bfloat16_is_told(monkeypatch, caplog, has_bfloat16):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has_bfloat16)
    with caplog.at_level("WARNING", logger="iou_d2"):
        build("vfnet_shapes", "MODEL.PRECISION", "float32")
        assert not caplog.records
        build("vfnet_shapes", "MODEL.PRECISION", "bfloat16")
    assert ["float32 is faster" in x.message for x in caplog.records] == [True] * (not has_bfloat16)


@pytest.mark.parametrize("config", CONFIGS)
def test_channels_last_changes_no_loss(config, make_batch):
    batch = make_batch([2, 1], side=64)
    losses = {}
    for layout in ("contiguous", "channels_last"):
        model = build(config, "MODEL.MEMORY_FORMAT", layout)
        seen = layouts_of_convolutions(model)
        losses[layout] = losses_of(model, batch)
        assert (sum(seen) > 0.9 * len(seen)) == (layout == "channels_last")
    assert losses["contiguous"].keys() == losses["channels_last"].keys()
    for name, loss in losses["contiguous"].items():
        torch.testing.assert_close(losses["channels_last"][name], loss, rtol=1e-5, atol=1e-6)


def test_maps_are_channels_last_on_cpus_unless_the_config_says_otherwise(make_batch):
    model = build("retinanet_shapes")
    seen = layouts_of_convolutions(model)
    model.eval()(make_batch([1]))
    assert all(seen)


def test_an_error_in_a_network_ends_its_autocast():
    network = nn.Conv2d(3, 4, 1)
    compute_in_bfloat16(network, "cpu")
    with pytest.raises(RuntimeError, match="channels"):
        network(torch.zeros(1, 2, 4, 4))
    assert not torch.is_autocast_enabled("cpu")
    assert network(torch.zeros(1, 3, 4, 4)).dtype == torch.float32


def test_a_copy_computes_with_its_own_weights():
    network = nn.Conv2d(3, 4, 1)
    compute_in_bfloat16(network, "cpu")
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.fill_(3)
    assert twin(torch.ones(1, 3, 2, 2)).unique().tolist() == [3]
    assert not torch.is_autocast_enabled("cpu")


def test_outputs_of_any_form_become_float32():
    class Pair(NamedTuple):
        scores: torch.Tensor
        nothing: None = None

    half, whole = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)
    result = as_float32({"a": [Pair(half)], "b": (half, whole)})
    assert isinstance(result["a"][0], Pair) and result["a"][0].nothing is None
    assert result["a"][0].scores.dtype == result["b"][0].dtype == torch.float32
    assert result["b"][1].dtype == torch.int64


def test_what_refines_boxes_stays_in_float32(small_cfg):
    cfg = small_cfg("iou_net_R_50_C4_1x", "MODEL.PRECISION", "bfloat16")
    model = Trainer.build_model(cfg)
    networks = networks_of(model)
    assert model.roi_heads.res5 not in networks and model.roi_heads.iou_branch not in networks
    assert model.roi_heads.box_predictor in networks and model.backbone in networks


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("PRECISION", "float16", "MODEL.PRECISION is 'float32' or 'bfloat16', but it is 'float16'"),
        ("MEMORY_FORMAT", "nhwc", "MODEL.MEMORY_FORMAT is one of auto, .* but it is 'nhwc'"),
    ],
)
def test_another_value_is_refused(key, value, sentence):
    cfg = get_config("quick/retinanet_shapes", ["MODEL.DEVICE", "cpu", f"MODEL.{key}", value])
    with pytest.raises(ValueError, match=sentence):
        check_config(cfg)
    with pytest.raises(ValueError, match=sentence):
        with_precision(nn.Linear(1, 1), cfg)


def test_a_model_of_unknown_networks_is_refused():
    cfg = get_config("", ["MODEL.PRECISION", "bfloat16"])
    with pytest.raises(ValueError, match="META_ARCHITECTURE is Linear: set them to 'float32'"):
        with_precision(nn.Linear(1, 1), cfg)
