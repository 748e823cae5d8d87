"""`iou-d2 COMMAND`: finds the module of a command and hands the other arguments to its `main`."""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path

from iou_d2.commands.errors import ending_in_a_sentence
from iou_d2.commands.threads import limit_spinning
from iou_d2.dependencies import missing_dependency

# A command is the module of its name in this folder, with "_" for "-".
COMMANDS = (
    "data",
    "train",
    "eval",
    "detect",
    "analyze",
    "compare",
    "draw",
    "report",
    "table",
    "zoo",
    "refine",
    "iou-branch",
    "figures",
    "oracle",
    "calibrate",
    "convert",
    "export",
    "install-detectron2",
)
# These run without it, or say themselves what they miss.
WITHOUT_DETECTRON2 = ("install-detectron2", "report")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return
    command, *arguments = argv
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
        sys.exit(f"iou-d2 has no command {command}. The nearest is {near}.")
    missing = None if command in WITHOUT_DETECTRON2 else missing_dependency()
    if missing:
        sys.exit(missing)
    limit_spinning()
    # The usage that argparse prints names the command.
    sys.argv[0] = f"iou-d2 {command}"
    with ending_in_a_sentence():
        importlib.import_module(f"iou_d2.commands.{module_name(command)}").main(arguments)


def module_name(command: str) -> str:
    return command.replace("-", "_")


def overview() -> str:
    """The commands, each with the first line of its docstring. Imports none of them."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {command:{width}}{summary(command)}" for command in COMMANDS]
    head = "iou-d2 COMMAND ..., of which --help says what it takes:"
    return "\n".join([head, "", *lines])


def summary(command: str) -> str:
    source = Path(__file__).with_name(f"{module_name(command)}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


if __name__ == "__main__":
    main()
