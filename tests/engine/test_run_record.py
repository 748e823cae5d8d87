from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

import iou_d2
from iou_d2 import get_config
from iou_d2.config_files import config_folder
from iou_d2.engine import run_record
from iou_d2.engine.run_record import config_name, describe_run, recorded

CONFIG = "configs/quick/retinanet_shapes.yaml"


@pytest.fixture
def record():
    return describe_run(get_config(CONFIG, ["SEED", "5"]), CONFIG, ["SEED", "5"])


def read(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_what_is_known_at_the_start_is_written_at_once(tmp_path, record):
    path = tmp_path / "out/run.json"
    with recorded(record, path):
        started = read(path)
    assert started["config"] == "quick/retinanet_shapes" and started["seed"] == 5
    assert started["overrides"] == ["SEED", "5"]
    assert started["train"] == ["shapes_train_4000x128"]
    assert started["versions"]["torch"] == torch.__version__
    assert started["versions"]["iou_d2"] == iou_d2.__version__
    assert len(started["devices"]) == 1
    assert started["start"].endswith("+00:00")
    assert [started[key] for key in ("seconds", "outcome", "results")] == [None] * 3


def test_the_end_adds_seconds_outcome_and_results(tmp_path, record):
    with recorded(record, tmp_path / "run.json"):
        record["results"] = {"bbox": {"AP": 40.5, "APl": float("nan")}, "localization": {"n": 3}}
    ended = read(tmp_path / "run.json")
    assert ended["results"] == {"bbox/AP": 40.5, "bbox/APl": None, "localization/n": 3}
    assert ended["outcome"] == "finished" and 0 <= ended["seconds"] < 60
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("error", [ValueError("no data"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_is_the_outcome_and_goes_on(tmp_path, record, error):
    with pytest.raises(type(error)), recorded(record, tmp_path / "run.json"):
        record["results"] = {"bbox": {"AP": 1.0}}
        raise error
    ended = read(tmp_path / "run.json")
    assert ended["outcome"] == f"{type(error).__name__}: {error}"
    assert ended["results"] == {"bbox/AP": 1.0}


def test_a_resumed_run_keeps_the_records_before_it(tmp_path):
    path = tmp_path / "run.json"
    for seed in ("1", "2", "3"):
        cfg = get_config(CONFIG, ["SEED", seed])
        with recorded(describe_run(cfg, CONFIG, []), path, keep_earlier=True):
            pass
    last = read(path)
    assert last["seed"] == 3 and [run["seed"] for run in last["earlier"]] == [1, 2]
    assert all("earlier" not in run for run in last["earlier"])
    with recorded(describe_run(cfg, CONFIG, []), path):
        pass
    assert "earlier" not in read(path)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_damaged_record_is_no_reason_to_stop(tmp_path, record, text):
    (tmp_path / "run.json").write_text(text)
    with recorded(record, tmp_path / "run.json", keep_earlier=True):
        pass
    assert read(tmp_path / "run.json")["earlier"] == []


def test_what_is_no_list_of_earlier_records_is_left_out(tmp_path, record):
    (tmp_path / "run.json").write_text('{"seed": 1, "earlier": 3}')
    with recorded(record, tmp_path / "run.json", keep_earlier=True):
        pass
    assert read(tmp_path / "run.json")["earlier"] == [{"seed": 1}]


def test_config_names(tmp_path):
    assert config_name(str(config_folder() / "quick/vfnet_shapes.yaml")) == "quick/vfnet_shapes"
    assert config_name(str(tmp_path / "own.yaml")) == str(tmp_path / "own.yaml")
    assert config_name("") == ""


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    package = tmp_path / "iou_d2/engine"
    package.mkdir(parents=True)
    monkeypatch.setattr(run_record, "__file__", str(package / "run_record.py"))
    assert run_record.commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "First"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert run_record.commit() == head.strip()
    (tmp_path / "file").write_text("2")
    assert run_record.commit() == head.strip() + "-dirty"
    subprocess.run([*git, "tag", "v1"], check=True)
    assert run_record.commit() == head.strip() + "-dirty"
