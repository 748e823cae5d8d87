"""What tests against other code share: converting a peer's weights, and comparing detections."""

from __future__ import annotations

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from checkpoint_helpers import assert_same, read
from iou_d2 import get_config
from iou_d2.commands.convert import main as convert


def randomize(model, spread: float = 1.0):
    """Every parameter and statistic at random, so that none can be taken for another."""
    generator = torch.Generator().manual_seed(0)
    for name, x in model.state_dict().items():
        if x.is_floating_point():
            value = torch.rand(x.shape, generator=generator) - (name[-3:] != "var") * 0.5
            x.copy_(value * spread * 2 / x[0].numel() ** 0.5 if x.ndim == 4 else value + 0.1)
    return model.eval()


def converted(tmp_path, capsys, state, layout: str, config: str, options) -> torch.nn.Module:
    """Our model of `config` with the weights of `state`, all of them filled, and a proof that they
    come back bit for bit."""
    theirs, ours, back = (str(tmp_path / name) for name in ("a.pth", "b.pth", "c.pth"))
    torch.save(state, theirs)
    with_config = ["--config-file", config, "--opts", *options]
    convert([theirs, ours, "--from", layout, "--to", "detectron2", *with_config])
    printed = capsys.readouterr().out
    assert not any(x in printed for x in ("Left over", "not filled", "Not in", "needs")), printed
    convert([ours, back, "--from", "detectron2", "--to", layout, *with_config])
    assert "Left over" not in capsys.readouterr().out
    content = read(back)
    content = content.get("state_dict", content.get("model", content))
    assert_same(dict(content), dict(state))
    model = build_model(get_config(config, [*options, "MODEL.WEIGHTS", ""]))
    DetectionCheckpointer(model).load(ours)
    return model


def assert_detections(found, boxes, scores, classes):
    """The same detections, in the order of their scores."""
    assert len(found) == len(scores) > 2
    torch.testing.assert_close(found.scores, scores.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.pred_boxes.tensor, boxes.float(), atol=0.05, rtol=0)
    assert torch.equal(found.pred_classes, classes)


def assert_gradients(model, expected: dict[str, torch.Tensor]):
    """Gradients of our parameters, relative to the norm of those `expected` by our names."""
    parameters = dict(model.named_parameters())
    for name, gradient in expected.items():
        difference = parameters[name].grad.double() - gradient.double()
        assert difference.norm() <= 1e-3 * gradient.norm(), name
