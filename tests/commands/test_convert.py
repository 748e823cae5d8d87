"""`iou-d2 convert` as a user runs it."""

from __future__ import annotations

import argparse
import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from checkpoint_helpers import CONFIG, DEFORMABLE, SMALL, assert_same, read
from iou_d2 import get_config
from iou_d2.commands.convert import main as convert
from iou_d2.engine.convert import translate


def write_mmdet(path, **extra):
    """A VFNet of the SMALL config in mmdetection's names, with counters as BatchNorm has."""
    cfg = get_config(CONFIG, [*SMALL, "MODEL.DEVICE", "cpu"])
    state = build_model(cfg).state_dict()
    names = translate(list(state), "detectron2", "mmdet")
    state = {names[name]: x for name, x in state.items()}
    state["backbone.bn1.num_batches_tracked"] = torch.tensor(77)
    torch.save({"state_dict": {**state, **extra}, "meta": {}}, path)
    return state


def test_counters_are_kept_aside_for_the_way_back(tmp_path):
    source, ours, back = (str(tmp_path / name) for name in ("a.pth", "b.pkl", "c.pth"))
    state = write_mmdet(source)
    convert([source, ours, "--from", "mmdet", "--to", "detectron2"])
    with open(ours, "rb") as file:
        content = pickle.load(file)
    assert not [name for name in content["model"] if "num_batches" in name]
    convert([ours, back, "--from", "detectron2", "--to", "mmdet"])
    assert_same(read(back)["state_dict"], state)


def test_what_is_left_over_on_either_side_is_named(tmp_path, capsys):
    source, ours = str(tmp_path / "a.pth"), str(tmp_path / "b.pth")
    extra = {
        "bbox_head.integral.project": torch.zeros(17),
        "ema_backbone_layer1_0_conv1_weight": torch.zeros(1),
        "ema_backbone_layer1_1_conv1_weight": torch.zeros(1),
        "note": "of training",
    }
    write_mmdet(source, **extra)
    with_config = ["--config-file", CONFIG, "--opts", *SMALL, *DEFORMABLE]
    with_config += ["MODEL.RETINANET.NUM_CONVS", "2"]
    convert([source, ours, "--from", "mmdet", "--to", "detectron2", *with_config])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{ours} has 321 of 324 tensors of {source}."
    assert lines[1:5] == [
        "Left over, without a counterpart: 4",
        "  bbox_head.integral.project",
        "  ema_backbone_layer1_0_conv1_weight and 1 like it",
        "  note",
    ]
    assert lines[5] == f"In the model of {CONFIG}, but not filled: 30"
    assert "  backbone.bottom_up.res3.0.conv2_offset.weight and 12 like it" in lines[6:12]
    assert "  head.cls_tower.1.offset.bias" in lines[6:12]
    assert lines[12] == f"Not in the model of {CONFIG}: 6"
    assert "  head.box_tower.2.norm.weight" in lines[13:]


def test_shapes_in_conflict_with_the_config_write_nothing(tmp_path):
    source, ours = str(tmp_path / "a.pth"), tmp_path / "b.pth"
    write_mmdet(source)
    with pytest.raises(SystemExit, match=r"2 tensors do not .* head.cls_pred.weight is \(3, 16"):
        convert(
            [source, str(ours), "--from", "mmdet", "--to", "detectron2"]
            + ["--config-file", CONFIG, "--opts", *SMALL, "MODEL.RETINANET.NUM_CLASSES", "4"]
        )
    assert not ours.exists()


def test_a_file_that_would_run_code_is_read_where_one_trusts_it(tmp_path):
    source, ours = str(tmp_path / "a.pth"), str(tmp_path / "b.pth")
    weight = torch.rand(8, 3, 7, 7)
    meta = {"arguments": argparse.Namespace()}
    torch.save({"state_dict": {"backbone.conv1.weight": weight}, "meta": meta}, source)
    arguments = [source, ours, "--from", "mmdet", "--to", "detectron2", "--format", "RGB"]
    with pytest.raises(SystemExit, match="it asks for argparse.Namespace"):
        convert(arguments)
    convert([*arguments, "--trust-weights"])
    assert read(ours)["model"]["backbone.bottom_up.stem.conv1.weight"].equal(weight)


CAFFE = """model = dict(backbone=dict(style='caffe'))
img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)"""


def test_pixels_are_read_off_the_mmdetection_config(tmp_path, capsys):
    source, ours = str(tmp_path / "a.pth"), str(tmp_path / "b.pth")
    weight = torch.rand(8, 3, 7, 7)
    state = {"backbone.conv1.weight": weight}
    arguments = [source, ours, "--from", "mmdet", "--to", "detectron2", "--force"]
    for key in ("config", "cfg"):
        torch.save({"state_dict": state, "meta": {key: CAFFE}}, source)
        convert(arguments)
        assert read(ours)["model"]["backbone.bottom_up.stem.conv1.weight"].equal(weight)
        assert (
            "INPUT.FORMAT BGR MODEL.PIXEL_MEAN [103.53, 116.28, 123.675] MODEL.PIXEL_STD "
            "[1.0, 1.0, 1.0] MODEL.RESNETS.STRIDE_IN_1X1 True" in capsys.readouterr().out
        )
        convert([*arguments, "--format", "RGB"])
        assert read(ours)["model"]["backbone.bottom_up.stem.conv1.weight"].equal(weight.flip(1))
        assert "RGB MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]" in capsys.readouterr().out


def test_what_a_model_of_mmdetection_has_to_be_told(tmp_path, capsys):
    source, theirs = str(tmp_path / "a.pth"), str(tmp_path / "b.pth")
    torch.save({"model": {"stem.conv1.weight": torch.rand(8, 3, 7, 7)}}, source)
    arguments = [source, theirs, "--from", "detectron2", "--to", "mmdet", "--force"]
    for more, sentence in (
        ([], "of the Detectron2 config; the order is that of the Detectron2 config too."),
        (["--format", "BGR"], "of the Detectron2 config; the order is RGB."),
        (
            ["--config-file", CONFIG, "--opts", *SMALL[:2]],
            "RGB, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]; its style is 'pyt",
        ),
        (
            ["--config-file", "configs/retinanet_R_50_FPN_1x.yaml", "--opts", *SMALL[:2]],
            "BGR, mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0]; its style is 'caffe'",
        ),
    ):
        convert(arguments + more)
        assert sentence in capsys.readouterr().out


def test_class_names_of_either_mmdetection(tmp_path):
    source, ours = str(tmp_path / "a.pth"), str(tmp_path / "b.pth")
    state = {"backbone.conv1.weight": torch.rand(8, 3, 7, 7)}
    for meta, names in (
        ({"CLASSES": ("cat", "dog")}, ["cat", "dog"]),
        ({"dataset_meta": {"CLASSES": ("cat",), "PALETTE": None}}, ["cat"]),
        ({"dataset_meta": {"classes": ["cat"]}}, ["cat"]),
        ({"dataset_meta": None, "CLASSES": None}, []),
    ):
        torch.save({"state_dict": state, "meta": meta}, source)
        convert([source, ours, "--from", "mmdet", "--to", "detectron2", "--force"])
        assert read(ours)["class_names"] == names


def test_a_bare_state_dict_of_a_parallel_model(tmp_path):
    source, ours = str(tmp_path / "a.pth"), str(tmp_path / "b.pth")
    weight = nn.Parameter(torch.rand(8, 3, 7, 7).half())
    torch.save({"module.backbone.conv1.weight": weight}, source)
    convert([source, ours, "--from", "mmdet", "--to", "detectron2"])
    written = read(ours)["model"]["backbone.bottom_up.stem.conv1.weight"]
    assert torch.equal(written, weight) and written.dtype == torch.float16
    assert not written.requires_grad


def expect_exit(match, *arguments):
    with pytest.raises(SystemExit, match=match) as stopped:
        convert([str(x) for x in arguments])
    assert stopped.value.code not in (0, None)


def test_what_is_wrong_is_said_and_nothing_is_written(tmp_path):
    source, ours = tmp_path / "a.pth", tmp_path / "b.pth"
    to_ours = ("--from", "mmdet", "--to", "detectron2")
    expect_exit("There is no file .*a.pth", source, ours, *to_ours)
    source.write_bytes(b"nonsense")
    expect_exit("a.pth is damaged or no checkpoint", source, ours, *to_ours)
    torch.save({}, source)
    expect_exit("No tensor in .*a.pth .* mmdet: it has none", source, ours, *to_ours)
    torch.save({"conv1.weight": torch.rand(8, 3, 7, 7)}, source)
    expect_exit("the first is conv1.weight. Its names are those of torch", source, ours, *to_ours)
    torch.save({"backbone.layer1.0.convs.0.weight": torch.rand(1)}, source)
    expect_exit("of a Res2Net, which cannot be converted", source, ours, *to_ours)
    assert not ours.exists()

    torch.save({"backbone.conv1.weight": torch.rand(8, 3, 7, 7)}, source)
    expect_exit("OUT is the folder", source, tmp_path, *to_ours)
    expect_exit("IN and OUT are the same file", source, source, *to_ours, "--force")
    (tmp_path / "link.pth").symlink_to(source)
    expect_exit("IN and OUT are the same", source, tmp_path / "link.pth", *to_ours, "--force")
    ours.write_text("mine")
    expect_exit("b.pth is there already; --force", source, ours, *to_ours)
    assert ours.read_text() == "mine"
    convert([str(source), str(ours), *to_ours, "--force"])
    assert "model" in read(ours)

    pkl = tmp_path / "b.pkl"
    to_mmdet = ("--from", "detectron2", "--to", "mmdet")
    expect_exit("only Detectron2 reads .pkl", ours, pkl, *to_mmdet)
    expect_exit("There is no config file", source, pkl, *to_ours, "--config-file", "x.yaml")
    wrong = ("--config-file", CONFIG, "--opts", "INPUT.FORMAT", "L")
    expect_exit("INPUT.FORMAT is 'BGR' or 'RGB'", source, pkl, *to_ours, *wrong)
    wrong = ("--config-file", CONFIG, "--format", "BGR")
    expect_exit("--format is BGR, but INPUT.FORMAT", source, pkl, *to_ours, *wrong)
    caffe = ("--config-file", CONFIG, "--opts", "MODEL.RESNETS.STRIDE_IN_1X1", "True")
    to_torchvision = ("--from", "detectron2", "--to", "torchvision")
    expect_exit("no ResNet of torchvision", ours, tmp_path / "c", *to_torchvision, *caffe)
    torch.save({"backbone.conv1.weight": torch.rand(8, 1, 7, 7)}, source)
    expect_exit("no 3 input channels", source, pkl, *to_ours, "--format", "BGR")
    torch.save({"backbone.conv1.weight": torch.rand(8, 3, 7, 7).bfloat16()}, source)
    expect_exit("NumPy has no bfloat16", source, pkl, *to_ours)
    assert not pkl.exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--from", "mmdet"),
        ("--from", "mmdet", "--to", "mmdet"),
        ("--from", "mmdet", "--to", "caffe2"),
        ("--from", "mmdet", "--to", "detectron2", "--opts", "MODEL.DEVICE", "cpu"),
        ("--from", "mmdet", "--to", "torchvision", "--format", "BGR"),
        ("--from", "torchvision", "--to", "mmdet", "--config-file", CONFIG),
    ],
)
def test_arguments_that_make_no_sense(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        convert(["a.pth", "b.pth", *arguments])
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_file_half_written_is_not_left_behind(tmp_path, monkeypatch, suffix):
    source, ours = tmp_path / "a.pth", tmp_path / f"b.{suffix}"
    torch.save({"backbone.conv1.weight": torch.rand(8, 3, 7, 7)}, source)
    ours.write_text("mine")

    def stop(content, file, **kwargs):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    monkeypatch.setattr(pickle, "dump", stop)
    with pytest.raises(KeyboardInterrupt):
        convert([str(source), str(ours), "--from", "mmdet", "--to", "detectron2", "--force"])
    assert ours.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_an_attack_ends_in_a_sentence(tmp_path):
    mark, source = tmp_path / "mark", tmp_path / "a.pkl"
    source.write_bytes(b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR.")
    sentence = "a.pkl is refused, and nothing in it was run: it asks for os.mkdir"
    expect_exit(sentence, source, tmp_path / "b", "--from", "detectron2", "--to", "mmdet")
    assert not mark.exists() and not (tmp_path / "b").exists()


def test_a_pickle_of_detectron2s_model_zoo(tmp_path):
    """The layout of ImageNetPretrained/torchvision/R-50.pkl."""
    source, theirs = tmp_path / "a.pkl", tmp_path / "b.pth"
    model = {
        "stem.conv1.weight": np.random.rand(8, 3, 7, 7).astype(np.float32),
        "stem.conv1.norm.running_mean": np.random.rand(8).astype(np.float32),
        "res2.0.shortcut.norm.bias": np.random.rand(8).astype(np.float32),
        "stem.fc.bias": np.random.rand(4).astype(np.float32),
    }
    source.write_bytes(
        pickle.dumps({"model": model, "__author__": "x", "matching_heuristics": True})
    )
    convert([str(source), str(theirs), "--from", "detectron2", "--to", "torchvision"])
    names = ("conv1.weight", "bn1.running_mean", "layer1.0.downsample.1.bias", "fc.bias")
    wanted = {name: torch.from_numpy(x) for name, x in zip(names, model.values())}
    assert_same(read(theirs), wanted)
