"""FCOS of mmdetection and AdelaiDet through the converter, against float64 by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from detectron2.modeling import build_model

import fcos_by_hand as by_hand
from checkpoint_helpers import assert_same, read
from fcos_by_hand import Variant
from iou_d2 import get_config
from iou_d2.commands.convert import main as convert
from iou_d2.engine.convert import translate
from peers import assert_detections, assert_gradients, converted, randomize

IMPROVED = "mmdet/fcos_improved_R_50_FPN"
OF_2019 = Variant(limits=(16, 32, 64, 128), num_groups=8)
NEW = {"norm_on_bbox": True, "centerness_on_reg": True, "center_sampling": True, "giou": True}
NEW = Variant(**NEW, nms=0.6, limits=(16, 32, 64, 128), num_groups=8)
KEY = "MODEL.POINT_DETECTOR."
SMALL = (
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.RETINANET.NUM_CLASSES", "3"),
    *(KEY + "NUM_GROUPS", "8", KEY + "MAX_DISTANCES", "[16, 32, 64, 128, 256]"),
    *("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "40"),
)
# Config and its overrides, and the variant that they are.
VARIANTS = {
    "2019": ("fcos_R_50_FPN_1x", (), OF_2019),
    "improved": (IMPROVED, (), NEW),
    "improved and deformable": (
        IMPROVED,
        (
            *(KEY + "DEFORMABLE_TOWER", "True", "MODEL.RESNETS.DEFORM_MODULATED", "True"),
            *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, True, True]"),
        ),
        NEW,
    ),
    "2019 and center sampling": (
        "fcos_R_50_FPN_1x",
        (KEY + "CENTER_SAMPLING_RADIUS", "1.5"),
        Variant(center_sampling=True, limits=OF_2019.limits, num_groups=8),
    ),
    "2019 and centerness on boxes, GIoU": (
        "fcos_R_50_FPN_1x",
        (KEY + "QUALITY_TOWER", "box", KEY + "BOX_LOSS", "giou"),
        Variant(centerness_on_reg=True, giou=True, limits=OF_2019.limits, num_groups=8),
    ),
    "2019 and norm on boxes": (
        "fcos_R_50_FPN_1x",
        (KEY + "BOX_CODEC", "relu"),
        Variant(norm_on_bbox=True, limits=OF_2019.limits, num_groups=8),
    ),
}


def mmdet_head_names(bias: bool, deformable: bool) -> set[str]:
    """Every name in the head of mmdetection's FCOS, by hand."""
    names = [f"scales.{level}.scale" for level in range(5)]
    for part in ("conv_cls", "conv_reg", "conv_centerness"):
        names += [f"{part}.weight", f"{part}.bias"]
    for part in [f"{x}_convs.{i}" for x in ("cls", "reg") for i in range(4)]:
        names += [f"{part}.conv.weight", f"{part}.gn.weight", f"{part}.gn.bias"]
        names += [f"{part}.conv.bias"] if bias else []
        if deformable and part.endswith("3"):
            names += [f"{part}.conv.conv_offset.weight", f"{part}.conv.conv_offset.bias"]
    return {f"bbox_head.{name}" for name in names}


def build_mmdet_state(tmp_path, config: str, options) -> dict:
    """A state dict of mmdetection with random numbers."""
    ours, theirs = str(tmp_path / "x.pth"), str(tmp_path / "y.pth")
    torch.save({"model": random_state(config, options)}, ours)
    convert([ours, theirs, "--from", "detectron2", "--to", "mmdet", "--config-file", config]
            + ["--opts", *options])  # fmt: skip
    return dict(read(theirs)["state_dict"])


def as_ours(results: list) -> list[tuple[torch.Tensor, ...]]:
    return [
        (
            torch.tensor([x[0] for x in image]).view(-1, 4),
            torch.tensor([x[1] for x in image]),
            torch.tensor([x[2] for x in image], dtype=torch.int64),
        )
        for image in results
    ]


def features_of(model, batch) -> list[torch.Tensor]:
    with torch.no_grad():
        features = model.features(model.preprocess_image(batch).tensor)
    return [x.double() for x in features]


@pytest.mark.parametrize("name", VARIANTS)
def test_fcos_of_mmdetection(name, tmp_path, capsys, make_batch):
    config, options, variant = VARIANTS[name]
    config, options = f"configs/{config}.yaml", [*SMALL, *options]
    state = build_mmdet_state(tmp_path, config, options)
    head = {x for x in state if x.startswith("bbox_head.")}
    assert head == mmdet_head_names(config.endswith(f"{IMPROVED}.yaml"), "deform" in name)
    model = converted(tmp_path, capsys, state, "mmdet", config, options)

    batch = make_batch([4, 0, 5])
    double = {n: state[n].double().requires_grad_() for n in head}
    predictions = by_hand.outputs(double, features_of(model, batch), variant)
    truth = [x["instances"] for x in batch]
    truth = [(x.gt_boxes.tensor.tolist(), x.gt_classes.tolist()) for x in truth]
    expected = by_hand.losses(predictions, truth, variant)
    found = model.train()(batch)
    for loss, value in expected.items():
        assert found[loss].item() == pytest.approx(value.item(), rel=1e-4), loss
    sum(expected.values()).backward()
    sum(found.values()).backward()
    names = translate(list(state), "mmdet", "detectron2")
    assert_gradients(model, {names[n]: x.grad for n, x in double.items()})

    predictions = [x.detach() if torch.is_tensor(x) else x for x in predictions]
    with torch.no_grad():
        found = [x["instances"] for x in model.eval()(batch)]
    expected = by_hand.detections(predictions, [(96, 96)] * 3, 0.05, 40, variant)
    for instances, image in zip(found, as_ours(expected)):
        assert_detections(instances, *image)


def in_theirs(state: dict, layout: str) -> dict:
    """Names of Detectron2's layout -> those of a peer whose backbone has the same, by hand."""
    head = "proposal_generator.fcos_head" if layout == "adelaidet" else "head"
    towers = ("cls_tower", "bbox_tower") if layout == "adelaidet" else ("cls_subnet", "bbox_subnet")
    names = {
        "head.cls_pred": f"{head}.{'cls_logits' if layout == 'adelaidet' else 'cls_score'}",
        "head.box_pred": f"{head}.bbox_pred",
        "head.quality_pred": f"{head}.ctrness",
    }
    for ours, theirs in zip(("cls_tower", "box_tower"), towers):
        for index in range(4):
            conv = f"{head}.{theirs}.{3 * index}"
            deformable = f"head.{ours}.{index}.offset.weight" in state
            names[f"head.{ours}.{index}"] = conv + ".conv" * deformable
            names[f"head.{ours}.{index}.offset"] = f"{conv}.offset"
            names[f"head.{ours}.{index}.norm"] = f"{head}.{theirs}.{3 * index + 1}"
    found = {}
    for name, x in state.items():
        part, last = name.rsplit(".", 1)
        if part == "head.box_scales":
            found[f"{head}.scales.{last}.scale"] = x.view(1)
        else:
            found[f"{names.get(part, part)}.{last}"] = x
    return found


def random_state(config: str, options, box_bias: float = 1.5) -> dict:
    state = randomize(build_model(get_config(config, [*options, "MODEL.WEIGHTS", ""]))).state_dict()
    for name in ("cls_pred", "box_pred", "quality_pred"):
        state[f"head.{name}.weight"] *= 2
    state["head.box_pred.bias"] += box_bias
    return dict(state)


@pytest.mark.parametrize(
    ("layout", "config", "options"),
    [
        ("adelaidet", "adelaidet/fcos_R_50_FPN_2x_ms", ()),
        (
            "adelaidet",
            "adelaidet/fcos_X_101_32x8d_FPN_dcn_2x_ms",
            ("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.NUM_GROUPS", "2"),
        ),
        ("detectron2_main", "detectron2/fcos_R_50_FPN", ()),
    ],
)
def test_names_by_hand_there_and_back(layout, config, options, tmp_path, capsys):
    config, options = f"configs/{config}.yaml", [*SMALL, *options]
    state = random_state(config, options)
    model = converted(tmp_path, capsys, in_theirs(state, layout), layout, config, options)
    assert_same(model.state_dict(), state)


def test_detections_of_adelaidet(make_batch, tmp_path, capsys):
    """Its losses are not compared: it adds 1 to areas in strides before it divides them."""
    config = "configs/adelaidet/fcos_R_50_FPN_1x.yaml"
    # Boxes of which many reach out of the image, where clipping them changes what NMS keeps.
    state = random_state(config, SMALL, box_bias=5.0)
    model = converted(tmp_path, capsys, in_theirs(state, "adelaidet"), "adelaidet", config, SMALL)
    batch = make_batch([0, 0])
    in_mmdet = dict(zip(translate(list(state), "detectron2", "mmdet").values(), state.values()))
    double = {n: x.double() for n, x in in_mmdet.items() if n.startswith("bbox_head.")}
    variant = replace(NEW, adelaidet=True)
    predictions = by_hand.outputs(double, features_of(model, batch), variant)
    with torch.no_grad():
        found = [x["instances"] for x in model.eval()(batch)]
    expected = by_hand.detections(predictions, [(96, 96)] * 2, 0.05, 40, variant)
    for instances, image in zip(found, as_ours(expected)):
        assert_detections(instances, *image)
