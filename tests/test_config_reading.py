from __future__ import annotations

import glob
import os

import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg

from iou_d2 import add_iou_config, load_config
from iou_d2.config_arithmetic import compute
from iou_d2.config_reading import read_config_file
from iou_d2.errors import InputError, MissingFileError


def load(path, *overrides: str):
    cfg = get_cfg()
    add_iou_config(cfg)
    load_config(cfg, str(path), overrides)
    return cfg


ZOO = os.path.join(os.path.dirname(model_zoo.__file__), "configs")


@pytest.mark.parametrize(
    "path",
    sorted(glob.glob(f"{ZOO}/COCO-Detection/*.yaml")) or [pytest.param("", marks=pytest.mark.skip)],
)
def test_configs_of_detectron2_are_read_as_detectron2_reads_them(path):
    want = get_cfg()
    add_iou_config(want)
    want.merge_from_file(path)
    assert load(path) == want


@pytest.mark.parametrize(
    "text",
    [
        "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]",
        "[(x, -y) for x in (1, 2) for y in [3 // 2, 7 % 4, 1 / 8]]",
        "[a - b for a, b in [(1, 2), [3, +4]]]",
        "[]",
    ],
)
def test_arithmetic_is_that_of_python(text):
    assert repr(compute(text)) == repr(eval(text))


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "[0] * 10**12",
        "2**63 * 2**63",
        "1 / 0",
        "(-8) ** 0.5",
        "1e308 * 10",
        "'a' * 9",
        "__import__('os').getcwd()",
        "(lambda: 1)()",
        "[x for x in [1] if x]",
        "[x for x in 3]",
        "x",
        "True",
        "1 if 1 else 2",
        "(" * 1500,
        "-" * 1500 + "1",
        "1 +",
        "1" * 5000,
        "[" + "[0 for a in [0,0,0,0,0,0,0,0,0,0] " + "for b in [0,0,0,0,0,0,0,0,0,0] " * 9 + "]]",
    ],
)
def test_what_is_no_small_arithmetic_is_refused(text):
    with pytest.raises(ValueError):
        compute(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("A: !!python/object/apply:os.mkdir [MARK]", "line 1, .*apply:os.mkdir is no part"),
        ("A: 1\nB: !!python/object/new:os.mkdir [MARK]", "line 2, .*new:os.mkdir is no part"),
        ("A: !!python/name:os.mkdir", "python/name:os.mkdir is no part"),
        ("A: !!python/module:os", "python/module:os is no part"),
        ("A: !own 3", "the tag !own is no part"),
        ('A: !!python/object/apply:eval [\'open("MARK", "w")\']', "line 1, .* is no arithmetic"),
        ("A: !!python/object/apply:eval [[1]]", "takes a list of one text"),
        ("A: 1\nA: 2", "line 2, sets A a second time"),
        ("A: " + "[" * 100_000, "some.yaml is nested too deeply"),
        ("A: " + "9" * 5000, "some.yaml"),
        ("A: 0x" + "f" * 5000, "line 1, has an integer beyond"),
        ("A: &a [*a]", "line 1 contains itself"),
        ("A: \0", "not valid YAML: .*x0000"),
        ("A: 2020-13-45", "some.yaml holds a value that cannot be read"),
        ("_BASE_: some.yaml", "some.yaml, which is based on it"),
        ("_BASE_: [3]", "_BASE_ in .*some.yaml names no file: 3"),
        ("_BASE_: .", "is a folder and not a config"),
        ("1: 2", "sets 1, which is not a config key"),
        ("SOLVER: {STEPS: 2020-01-01}", "some.yaml cannot be merged"),
        ("SOLVER: {MAX_ITER: many}", "cannot be merged: .*SOLVER.MAX_ITER"),
    ],
)
def test_hostile_files_are_one_sentence(tmp_path, monkeypatch, text, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(InputError, match=sentence) as raised:
        load("some.yaml")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert os.listdir() == ["some.yaml"]


def test_aliases_that_stand_for_very_much_are_refused(tmp_path):
    lines = ["a0: &a0 {x: 1, y: 1}"]
    lines += [f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 40)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="more than 100000 values"):
        read_config_file(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path, encoding):
    (tmp_path / "a.yaml").write_text("OUTPUT_DIR: gr\u00fc\u00df", encoding=encoding)
    assert read_config_file(str(tmp_path / "a.yaml")) == {"OUTPUT_DIR": "gr\u00fc\u00df"}
    (tmp_path / "a.yaml").write_bytes(b"OUTPUT_DIR: gr\xfc")
    with pytest.raises(InputError, match="a.yaml is not UTF-8 text"):
        read_config_file(str(tmp_path / "a.yaml"))


def test_plain_data_of_python_is_read_and_bases_lie_under_their_file(tmp_path):
    data = {"SOLVER": {"STEPS": (1, 2)}, "SEED": 3}
    (tmp_path / "a.yaml").write_text(yaml.dump(data))
    (tmp_path / "b.yaml").write_text("SEED: 4")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]\nSOLVER: {MAX_ITER: 5}")
    want = {"SOLVER": {"STEPS": (1, 2), "MAX_ITER": 5}, "SEED": 4}
    assert read_config_file(str(tmp_path / "c.yaml")) == want
    (tmp_path / "d.yaml").write_text("_BASE_: [c.yaml, c.yaml]")
    assert read_config_file(str(tmp_path / "d.yaml")) == want
    (tmp_path / "a.yaml").write_text("_BASE_: c.yaml")
    with pytest.raises(InputError, match="is based on"):
        read_config_file(str(tmp_path / "d.yaml"))
    with pytest.raises(MissingFileError, match="no config file"):
        read_config_file(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("value", ["many", "[" * 100_000, "9" * 5000, "-" * 9000 + "1", "\0"])
def test_an_override_of_another_type_names_its_key(value):
    with pytest.raises(InputError, match="The command line sets SOLVER.MAX_ITER to ") as raised:
        load("", "SOLVER.MAX_ITER", value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
