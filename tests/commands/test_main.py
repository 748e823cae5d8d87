from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iou_d2.commands import main as dispatcher
from iou_d2.commands.export import TYPES
from iou_d2.commands.main import COMMANDS, main, module_name
from iou_d2.commands.parsers import eval as evaluate
from iou_d2.commands.parsers import export, oracle, train
from iou_d2.engine.oracle import ORACLES

FOLDER = Path("iou_d2/commands")


def python(program: str) -> str:
    """What a program prints in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_has_a_parser_and_a_run_and_no_other_module_has():
    runs = {path.stem for path in FOLDER.glob("*.py") if "\ndef run(" in path.read_text()}
    parsers = {path.stem for path in FOLDER.glob("parsers/[!_]*.py")}
    assert {module_name(command) for command in COMMANDS} == runs == parsers


def test_help_and_wrong_arguments_need_nothing_but_python():
    program = """
import sys
for name in ("torch", "torchvision", "detectron2", "fvcore", "cv2", "numpy", "PIL", "yaml"):
    sys.modules[name] = None  # an import of it fails
from iou_d2.commands.main import COMMANDS, main
for command in COMMANDS:
    for argument in ("--help", "--no-such"):
        try:
            main([command, argument])
        except SystemExit as ended:
            print("ended", command, argument, ended.code)"""
    ended = [line.split()[1:] for line in python(program).splitlines() if line.startswith("ended ")]
    expected = [[x, *y] for x in COMMANDS for y in (("--help", "0"), ("--no-such", "2"))]
    assert ended == expected


def test_commands_on_files_alone_load_without_torch():
    program = """
import sys
for name in ("torch", "torchvision", "detectron2", "fvcore"):
    sys.modules[name] = None  # an import of it fails
import iou_d2.commands.detect, iou_d2.commands.draw, iou_d2.commands.report"""
    assert python(program) == ""


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_alone_it_lists_the_commands_and_loads_no_torch(arguments):
    program = f"""
import sys
from iou_d2.commands.main import main
main({arguments!r})
print([name for name in ("torch", "detectron2", "cv2", "numpy") if name in sys.modules])"""
    *lines, loaded = python(program).splitlines()
    assert loaded == "[]"
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
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 0
    assert capsys.readouterr().out.startswith("usage: iou-d2 table ")


def test_a_command_has_limited_spinning_and_keeps_memory_and_ends_in_a_sentence(monkeypatch):
    kept = []
    monkeypatch.setattr(dispatcher, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with pytest.raises(SystemExit, match="There is no folder nowhere."):
        main(["table", "nowhere"])
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    assert kept


def test_spinning_is_limited_unless_the_user_said_otherwise(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    dispatcher.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_eval_is_train_with_eval_only_or_takes_a_file():
    args = evaluate.parse_args(["--test", "a"])
    assert args.eval_only and args.test == ["a"] and args.model is None
    assert train.make_parser("").parse_args(["--test", "a"]).eval_only is False
    assert evaluate.parse_args(["--model=x.onnx"]).model == "x.onnx"


def test_choices_are_those_that_there_are():
    assert export.TYPES == tuple(TYPES)
    assert oracle.ORACLES == tuple(ORACLES)
