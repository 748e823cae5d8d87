"""Rows of classes are matched by name: what a model says of a class that it keeps is the same."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from iou_d2.config import set_class_names
from iou_d2.config_files import config_names
from iou_d2.engine.checkpoint import SafeCheckpointer
from iou_d2.engine.class_rows import ClassRows, ModelClasses, classes_of_model
from iou_d2.errors import InputError

OLD = ["cat", "dog", "cow"]
NEW = ["cow", "emu", "cat", "fox", "hen"]
DENSE = "retinanet iou_retinanet vfnet atss fcos unitbox ssd ssd_iou refinedet"
# A config of each kind of heads, with keys that change which tensors have rows of classes.
ONE_OF_EACH = [
    *((f"quick/{name}_shapes", ()) for name in DENSE.split()),
    ("quick/faster_rcnn_shapes", ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")),
    ("quick/faster_rcnn_shapes", ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "False")),
    ("quick/iou_net_shapes", ("MODEL.IOU_NET.CLASS_AGNOSTIC", "True")),
    ("quick/iou_net_shapes", ()),
    ("quick/iou_net_standalone_shapes", ()),
    ("iou_net_cascade_R_50_FPN_1x", ()),
    ("iou_net_mask_R_50_FPN_1x", ("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True")),
    ("iou_net_mask_R_50_FPN_1x", ("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "False")),
]
# What every architecture of ours is built by.
SMALL_HEADS = ("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8")


def model_of(small_cfg, config: str, names: list[str], overrides=()):
    cfg = small_cfg(config, *SMALL_HEADS, *overrides)
    set_class_names(cfg, names)
    torch.manual_seed(len(names))
    return build_model(cfg).eval(), cfg


def load(model, cfg, path) -> SafeCheckpointer:
    checkpointer = SafeCheckpointer(model, classes=classes_of_model(model, cfg))
    checkpointer.load(str(path))
    return checkpointer


def save(model, names, path) -> str:
    with torch.no_grad():  # fresh biases are alike
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"model": model.state_dict(), "class_names": names}, path)
    return str(path)


@pytest.mark.parametrize(("config", "overrides"), ONE_OF_EACH)
def test_the_table_has_exactly_what_grows_with_the_number_of_classes(small_cfg, config, overrides):
    shapes = []
    for names in (OLD, NEW):
        model, cfg = model_of(small_cfg, config, names, overrides)
        shapes.append({name: x.shape for name, x in model.state_dict().items()})
    grown = {name for name, shape in shapes[0].items() if shape != shapes[1][name]}
    assert set(classes_of_model(model, cfg).rows) == grown != set()


def test_every_architecture_of_our_configs_is_looked_at(small_cfg):
    names = [name for name in config_names() if "Base-" not in name]
    used = {small_cfg(name).MODEL.META_ARCHITECTURE for name in names}
    assert used == {small_cfg(name).MODEL.META_ARCHITECTURE for name, _ in ONE_OF_EACH}
    assert used <= {name for name, _ in META_ARCH_REGISTRY}


def outputs(model) -> list[torch.Tensor]:
    """What the heads say of noise: (classes + background, ...) or (classes, 4, ...) each."""
    torch.manual_seed(7)
    if not hasattr(model, "roi_heads"):
        predictions = model.predict(torch.randn(1, 3, 160, 160))
        if hasattr(predictions, "logits"):
            logits = predictions.logits[0]
            return [logits.t() if logits.dim() == 2 else logits]
        logits = [level.logits[0] for level in predictions]
        return [x.flatten(1) if x.dim() == 3 else x.t() for x in logits]
    heads, found = model.roi_heads, []
    predictors = heads.box_predictor
    for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
        scores, deltas = predictor(torch.randn(2, predictor.cls_score.in_features))
        found.append(scores.t())
        if deltas.shape[1] > 4:
            found.append(deltas.view(2, -1, 4).transpose(0, 1))
    if hasattr(heads, "iou_branch") and heads.iou_branch.iou_pred.out_features > 1:
        layer = heads.iou_branch.iou_pred
        found.append(layer(torch.randn(2, layer.in_features)).t())
    if hasattr(heads, "mask_head") and heads.mask_head.predictor.out_channels > 1:
        layer = heads.mask_head.predictor
        found.append(layer(torch.randn(1, layer.in_channels, 3, 3))[0])
    return found


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Kernels sum in another order for another number of channels."""
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("new", [NEW, ["emu", "cow", "dog"], ["dog", "cow"]])
@pytest.mark.parametrize(("config", "overrides"), ONE_OF_EACH)
@torch.no_grad()
def test_a_class_says_what_it_said(small_cfg, tmp_path, config, overrides, new):
    """The oracle is what the models put out, which knows nothing of rows. Three other classes in
    place of three, of which two are known in another order, are no exception."""
    source, _ = model_of(small_cfg, config, OLD, overrides)
    path = save(source, OLD, tmp_path / "a.pth")
    model, cfg = model_of(small_cfg, config, new, overrides)
    fresh = {name: x.clone() for name, x in model.state_dict().items()}
    rows = classes_of_model(model, cfg).rows
    assert load(model, cfg, path).mismatch.is_whole
    before, after = outputs(source), outputs(model)
    assert len(before) == len(after) > 0
    for old, found in zip(before, after):
        assert len(found) - len(new) == len(old) - len(OLD) in (0, 1)
        for i, name in enumerate(new):
            if name in OLD:
                assert_near(found[i], old[OLD.index(name)])
        if len(old) > len(OLD):
            assert_near(found[-1], old[-1])  # background
    for name, x in model.state_dict().items():
        if name not in rows:
            assert torch.equal(x, source.state_dict()[name]), name
        elif "emu" in new:  # by hand, for a class that starts anew
            order, index = rows[name], new.index("emu")
            of_group = x[: len(x) - order.background].chunk(order.groups)
            fresh_of_group = fresh[name][: len(x) - order.background].chunk(order.groups)
            for rows_of_all, fresh_of_all in zip(of_group, fresh_of_group):
                part = slice(index * order.per_class, (index + 1) * order.per_class)
                assert torch.equal(rows_of_all[part], fresh_of_all[part]), name


def test_rows_against_loops():
    order = ClassRows(groups=2, per_class=3, background=1)
    old, fresh = torch.arange(2 * 4 * 3 + 1.0), -torch.arange(2 * 2 * 3 + 1.0)
    found = order.moved(old, fresh, {1: 3}).tolist()
    for group in range(2):
        for index in range(2):
            for row in range(3):
                place = (group * 2 + index) * 3 + row
                wanted = old[(group * 4 + 3) * 3 + row] if index == 1 else fresh[place]
                assert found[place] == wanted
    assert found[-1] == 24 and fresh[0] == 0 and len(found) == order.count(2)


@pytest.mark.parametrize("ending", ["pth", "pkl"])
def test_person_and_dog_of_coco(small_cfg, tmp_path, caplog, ending):
    names = [f"class{i}" for i in range(80)]
    names[0], names[16] = "person", "dog"
    source, _ = model_of(small_cfg, "quick/retinanet_shapes", names)
    path = save(source, names, tmp_path / "coco.pth")
    if ending == "pkl":
        content = torch.load(path)
        content["model"] = {name: x.numpy() for name, x in content["model"].items()}
        content["__author__"] = "iou_d2"
        path = tmp_path / "coco.pkl"
        path.write_bytes(pickle.dumps(content))
    model, cfg = model_of(small_cfg, "quick/retinanet_shapes", ["dog", "yak", "person"])
    with caplog.at_level("INFO", "iou_d2.engine.class_rows"):
        load(model, cfg, path)
    assert "the rows of dog, person are kept in 2 tensors; yak start anew." in caplog.text
    old = source.state_dict()["head.cls_score.bias"].view(-1, 80)
    new = model.state_dict()["head.cls_score.bias"].view(-1, 3)
    assert torch.equal(new[:, 0], old[:, 16]) and torch.equal(new[:, 2], old[:, 0])
    assert len(set(new[:, 1].tolist())) == 1  # the prior of a fresh class


def test_the_same_classes_and_unknown_ones_are_loaded_as_they_are(small_cfg, tmp_path, caplog):
    source, _ = model_of(small_cfg, "quick/atss_shapes", OLD)
    for known in (OLD, [], None):
        path = save(source, known, tmp_path / "a.pth")
        model, cfg = model_of(small_cfg, "quick/atss_shapes", OLD)
        with caplog.at_level("INFO", "iou_d2.engine.class_rows"):
            load(model, cfg, path)
        state = source.state_dict()
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert "other classes" not in caplog.text
    model, cfg = model_of(small_cfg, "quick/atss_shapes", NEW)
    mismatch = load(model, cfg, path).mismatch  # without names another number is told, as ever
    assert len(mismatch.other_shapes) == 2 and not mismatch.is_whole


def test_rows_that_are_not_those_of_the_classes_start_anew(small_cfg, tmp_path, caplog):
    """The file says that it has four classes, but its tensors have rows of three."""
    source, _ = model_of(small_cfg, "quick/atss_shapes", OLD)
    path = save(source, [*OLD, "ape"], tmp_path / "a.pth")
    model, cfg = model_of(small_cfg, "quick/atss_shapes", ["ape", "cat", "cow"])
    fresh = model.head.cls_pred.weight.clone()
    mismatch = load(model, cfg, path).mismatch
    assert torch.equal(model.head.cls_pred.weight, fresh)
    assert mismatch.missing == ("head.cls_pred.bias", "head.cls_pred.weight")
    assert "head.cls_pred.weight in" in caplog.text and "rows, which are not those" in caplog.text


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("cut", [0, 1])
def test_other_beginnings_of_the_names(small_cfg, tmp_path, prefix, cut):
    """Of DistributedDataParallel, or matched by their ends where the file asks for that."""
    source, _ = model_of(small_cfg, "quick/atss_shapes", OLD)
    save(source, OLD, tmp_path / "a.pth")
    weights = {
        prefix + ".".join(name.split(".")[cut:]): x for name, x in source.state_dict().items()
    }
    content = {"model": weights, "class_names": OLD, "matching_heuristics": bool(cut)}
    torch.save(content, tmp_path / "b.pth")
    model, cfg = model_of(small_cfg, "quick/atss_shapes", ["cow", "emu", "cat"])
    load(model, cfg, tmp_path / "b.pth")
    old = source.head.cls_pred.weight
    assert torch.equal(model.head.cls_pred.weight[[0, 2]], old[[2, 0]])
    assert not torch.equal(model.head.cls_pred.weight[1], old[1])


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["cat", "cat", "dog"], "has one of the class_names cat, cat, dog twice"),
        ("cat", "class_names in .*a.pth are no list of names"),
        ([1, 2, 3], "class_names in .*a.pth are no list of names"),
    ],
)
def test_names_that_are_none_are_refused(small_cfg, tmp_path, names, sentence):
    source, cfg = model_of(small_cfg, "quick/atss_shapes", OLD)
    path = save(source, names, tmp_path / "a.pth")
    with pytest.raises(InputError, match=sentence):
        load(source, cfg, path)


def test_a_model_of_which_no_rows_are_known_keeps_no_wrong_ones(tmp_path):
    torch.save({"model": nn.Linear(2, 3).state_dict(), "class_names": OLD}, tmp_path / "a.pth")
    model = nn.Linear(2, 3)
    checkpointer = SafeCheckpointer(model, classes=ModelClasses(["x", "y", "z"], {}))
    sentence = re.escape("which of its tensors have rows of classes is not known")
    with pytest.raises(InputError, match=sentence):
        checkpointer.load(str(tmp_path / "a.pth"))
