from __future__ import annotations

import glob
import math

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks

from iou_d2 import add_iou_config, load_config
from iou_d2.config import set_class_names, use_available_device
from iou_d2.detectors.multibox import LevelConvs


def load(config_file: str, *overrides: str):
    cfg = get_cfg()
    add_iou_config(cfg)
    load_config(cfg, config_file, overrides)
    return cfg


def write(folder, text: str) -> str:
    path = folder / "some.yaml"
    path.write_text(text)
    return str(path)


def test_overrides_win_over_the_file_and_the_file_over_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {BASE_LR: 0.5, MAX_ITER: 7, IMS_PER_BATCH: 3}")
    text = '_BASE_: "base.yaml"\nSOLVER: {BASE_LR: 0.25, MAX_ITER: 8}'
    cfg = load(write(tmp_path, text), "SOLVER.MAX_ITER", "9")
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (3, 0.25, 9)


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        (
            "MODEL: {RETINANET: {NUM_CLASES: 3}}",
            "MODEL.RETINANET.NUM_CLASES",
            "MODEL.RETINANET.NUM_CLASSES",
        ),
        (
            "MODEL: {IOU_RETINANT: {ALPHA: 1.0}}",
            "MODEL.IOU_RETINANT.ALPHA",
            "MODEL.IOU_RETINANET.ALPHA",
        ),
        ("SOLVER: {BASELR: 1.0}", "SOLVER.BASELR", "SOLVER.BASE_LR"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest(tmp_path, text, wrong, nearest):
    path = write(tmp_path, text)
    with pytest.raises(KeyError) as raised:
        load(path)
    assert path in str(raised.value) and f"sets {wrong}," in str(raised.value)
    assert f"key is {nearest}." in str(raised.value)
    with pytest.raises(KeyError, match=f"The command line sets {wrong}, .* key is {nearest}."):
        load("", wrong, "3")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("MODEL: {RETINANET: [3\nA: 3", "is not valid YAML"),
        ("", "holds no config keys"),
        ("- 1\n- 2", "holds no config keys"),
        ('_BASE_: "nowhere.yaml"', "based on .*nowhere.yaml, which is not there"),
        ('MODEL: {RETINANET: {NUM_CLASSES: "three"}}', "MODEL.RETINANET.NUM_CLASSES"),
        ("MODEL: {RETINANET: 3}", "sets MODEL.RETINANET, which is not a config key"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, sentence):
    path = write(tmp_path, text)
    with pytest.raises((ValueError, FileNotFoundError, KeyError), match=f"some.yaml.*{sentence}"):
        load(path)


def test_a_missing_file_and_a_lonely_key_are_named():
    with pytest.raises(FileNotFoundError, match="no config file nowhere.yaml. The nearest of"):
        load("nowhere.yaml")
    with pytest.raises(ValueError, match="SOLVER.BASE_LR"):
        load("", "SOLVER.BASE_LR")


@pytest.mark.parametrize("name", ["quick/vfnet_own_data", "quick/vfnet_own_data.yaml"])
def test_a_name_finds_the_config_that_comes_with_iou_d2(tmp_path, monkeypatch, name):
    want = load("configs/quick/vfnet_own_data.yaml").dump()
    monkeypatch.chdir(tmp_path)
    assert load(name).dump() == want
    (tmp_path / "quick").mkdir()
    (tmp_path / name).write_text("SEED: 3")  # a file wins over a name
    assert load(name).SEED == 3


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("configs/quick/vfnet_own_data.yaml", "but one .* give its name, quick/vfnet_own_data.$"),
        ("/x/configs/vfnet_R_50_FPN_1x", "but one .* give its name, vfnet_R_50_FPN_1x.$"),
        ("vfnet_own_data", "The nearest of .*: quick/vfnet_own_data,"),
        ("quick", "The nearest of .*: quick/"),
        ("../configs/quick", "The nearest of .*: quick/"),
    ],
)
def test_an_unknown_name_comes_with_the_nearest(tmp_path, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^There is no config file {name}.*{sentence}"):
        load(name)


def test_a_saved_config_loads_again(tmp_path):
    cfg = load("configs/iou_retinanet_R_50_FPN_1x.yaml", "MODEL.IOU_RETINANET.ALPHA", "0.3")
    set_class_names(cfg, ["cat", "dog"])
    again = load(write(tmp_path, cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    assert again.MODEL.CLASS_NAMES == ["cat", "dog"] and again.MODEL.RETINANET.NUM_CLASSES == 2


def test_without_cuda_the_cpu_is_used_and_it_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = load("")
    use_available_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu"
    assert capsys.readouterr().out == "CUDA is not available, so the model runs on the CPU.\n"
    use_available_device(cfg)
    assert capsys.readouterr().out == ""


CONFIGS = [x for x in glob.glob("configs/**/*.yaml", recursive=True) if "/Base-" not in x]
# As deep as the config says, but with few channels: a ResNeXt-101 builds in a tenth of the time.
THIN = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
]


def make_thin(cfg, config_file):
    """Where it is not small by itself."""
    resnet = cfg.MODEL.RESNETS
    if "quick" not in config_file and resnet.DEPTH >= 50:
        width = 1 if resnet.NUM_GROUPS > 1 else 8
        cfg.merge_from_list([*THIN, "MODEL.RESNETS.WIDTH_PER_GROUP", width])


@pytest.mark.parametrize("config_file", sorted(CONFIGS))
def test_every_config_builds_and_trains_a_step(config_file, make_batch, event_storage):
    # Random weights behind the frozen statistics of a deep backbone overflow.
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.NORM", "BN"]
    cfg = load(config_file, *overrides)
    make_thin(cfg, config_file)
    classes = cfg.MODEL.RETINANET.NUM_CLASSES
    set_class_names(cfg, list(map(str, range(classes))))
    torch.manual_seed(0)
    model = build_model(cfg).train()
    # Gradients of random weights reach 10^4. At a rate of 1e-4 the first step of a cascade now and
    # then threw all boxes out of the image, so that its later stages saw none.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    heads = model.head if hasattr(model, "head") else model.roi_heads
    of_levels = {
        f"{prefix}.{name}"
        for prefix, module in heads.named_modules()
        if isinstance(module, LevelConvs)
        for name, _ in module.named_parameters()
    }
    trained = [
        parameter
        for name, parameter in heads.named_parameters()
        # The last stage of a cascade sees no object as yet, nor do most levels of a pyramid. The
        # gradient of L1 in a bias is a sum of signs, which may cancel. SSD and RefineDet have
        # convolutions of their own for each level.
        if parameter.requires_grad
        and not name.endswith("bbox_pred.bias")
        and "box_predictor.2.bbox_pred" not in name
        and "scales" not in name
        and name not in of_levels
    ]
    batch = make_batch([2, 0], classes, side=64)
    for image in batch:
        masks = torch.ones(len(image["instances"]), 64, 64, dtype=torch.bool)
        image["instances"].gt_masks = BitMasks(masks)
    sum(model(batch).values()).backward()
    optimizer.step()
    with torch.no_grad():
        losses = model(batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert len(trained) > 3 or of_levels
    assert all(0 < parameter.grad.abs().sum() < math.inf for parameter in trained)
