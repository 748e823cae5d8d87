"""MODEL.COMPILE, by torch's backend "eager", which traces graphs and makes no code of them."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch._dynamo.testing import CompileCounter

from iou_d2 import get_config
from iou_d2.engine import build
from iou_d2.engine.build import as_configured
from iou_d2.engine.compilation import CompiledForward, compile_networks, require_compiler
from iou_d2.engine.precision import networks_of
from iou_d2.errors import InputError

DENSE = "retinanet iou_retinanet vfnet atss fcos unitbox ssd ssd_iou refinedet".split()
# What makes one graph of a few convolutions of a large one.
SHALLOW = ("MODEL.RETINANET.NUM_CONVS", "1")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def config_of(name: str, *overrides: str) -> CfgNode:
    keys = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *SHALLOW, *overrides)
    return get_config(f"quick/{name}_shapes", keys)


def built(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(0)
    return build_model(cfg)


def tensors_in(value) -> list[torch.Tensor]:
    """All tensors of predictions of any form, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "tensor"):  # Boxes
        return [value.tensor]
    return [x for part in value or () for x in tensors_in(part)]


@pytest.mark.parametrize("name", DENSE)
def test_predict_of_a_dense_detector_is_one_graph(name):
    model = built(config_of(name))
    predict = torch.compile(model.predict, backend="eager", fullgraph=True)
    images = torch.randn(2, 3, 64, 96)
    wanted, found = tensors_in(model.predict(images)), tensors_in(predict(images))
    assert len(found) == len(wanted) > 2
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


def compiled(model: nn.Module, cfg, backend) -> nn.Module:
    compile_networks(networks_of(as_configured(model, cfg)), backend)
    return model


def losses_of(model: nn.Module, batch: list[dict]) -> dict[str, float]:
    torch.manual_seed(0)
    with EventStorage():
        return {name: x.item() for name, x in model.train()(batch).items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["vfnet", "iou_net"])
def test_compiled_networks_compute_the_same(name, precision, make_batch):
    cfg = config_of(name, "MODEL.PRECISION", precision)
    counter = CompileCounter()
    plain = as_configured(built(cfg), cfg)
    model = compiled(built(cfg), cfg, counter)
    assert list(model.state_dict()) == list(plain.state_dict())
    batch = make_batch([2, 1], side=64)
    assert losses_of(model, batch) == pytest.approx(losses_of(plain, batch), rel=1e-4)
    assert counter.frame_count == len(networks_of(model))
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        wanted, found = (x.eval()(batch[:1])[0]["instances"].get_fields() for x in (plain, model))
    assert found.keys() == wanted.keys() and counter.frame_count > len(networks_of(model))
    for key, value in wanted.items():
        (x,), (y,) = tensors_in(found[key]), tensors_in(value)
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_other_sizes_make_no_more_code_than_one_for_all():
    network, counter = nn.Conv2d(1, 1, 3), CompileCounter()
    compile_networks([network], counter)
    for side in (8, 9, 10, 20, 31):
        assert network(torch.zeros(1, 1, side, side)).shape[-1] == side - 2
    assert counter.frame_count == 2


def test_a_copy_computes_with_its_own_weights():
    network, counter = nn.Sequential(nn.Linear(2, 1)), CompileCounter()
    compile_networks([network], counter)
    twin = copy.deepcopy(network)
    assert isinstance(twin.forward, CompiledForward)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.fill_(3)
    assert twin(torch.ones(1, 2)).tolist() == [[3]]
    assert twin.forward.backend.frame_count == 1  # the counter is copied, too
    assert network(torch.ones(1, 2)).tolist() != [[3]]


def test_the_key_compiles_the_networks_of_a_model(monkeypatch):
    monkeypatch.setattr(build, "require_compiler", lambda device: None)
    cfg = config_of("iou_net", "MODEL.COMPILE", "True")
    model = build.build_detector(cfg)
    heads = model.roi_heads
    networks = [model.backbone, model.proposal_generator.rpn_head, heads.box_head]
    assert all(isinstance(x.forward, CompiledForward) for x in (*networks, heads.box_predictor))
    assert not isinstance(heads.iou_branch.forward, CompiledForward)
    with pytest.raises(InputError, match="META_ARCHITECTURE is Linear: set them to .* and False"):
        as_configured(nn.Linear(1, 1), cfg)
    cfg.MODEL.COMPILE = False
    assert not isinstance(build.build_detector(cfg).backbone.forward, CompiledForward)


def test_a_missing_compiler_is_told_in_a_sentence(monkeypatch):
    def compile(function):
        raise RuntimeError("No working C++ compiler found.\nDetails.")

    monkeypatch.setattr(torch, "compile", compile)
    sentence = "COMPILE is True, .* for cpu: No working C\\+\\+ compiler found. Set it to False"
    with pytest.raises(InputError, match=sentence):
        require_compiler("cpu")
