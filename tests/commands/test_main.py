from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iou_d2.commands import main as dispatcher
from iou_d2.commands.main import COMMANDS, main, module_name

FOLDER = Path("iou_d2/commands")


def test_every_module_with_a_main_is_a_command_and_has_a_line():
    modules = {
        path.stem
        for path in FOLDER.glob("*.py")
        if path.stem != "main" and "\ndef main(" in path.read_text()
    }
    assert {module_name(command) for command in COMMANDS} == modules


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_alone_it_lists_the_commands_and_loads_no_torch(arguments):
    program = f"""
import sys
from iou_d2.commands.main import main
main({arguments!r})
print([name for name in ("torch", "detectron2", "cv2", "numpy") if name in sys.modules])"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "[]", done.stderr
    described = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert tuple(described) == COMMANDS
    assert described["draw"] == "Draw ground truth beside predictions, from result files alone."


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("trian", "train"), ("iou_branch", "iou-branch"), ("evaluate", "eval")],
)
def test_an_unknown_command_comes_with_the_nearest(wrong, nearest):
    with pytest.raises(SystemExit, match=f"no command {wrong}. The nearest is {nearest}."):
        main([wrong])


def test_a_command_gets_its_arguments_and_its_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["iou-d2", "table", "--help"])
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 0
    assert capsys.readouterr().out.startswith("usage: iou-d2 table ")
    assert os.environ["GOMP_SPINCOUNT"] == "10000"


def test_spinning_is_limited_unless_the_user_said_otherwise(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    dispatcher.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_eval_is_train_with_eval_only(monkeypatch):
    from iou_d2.commands import eval as evaluate

    monkeypatch.setattr(evaluate, "train", lambda argv: argv)
    assert evaluate.main(["--test", "a"]) == ["--eval-only", "--test", "a"]
