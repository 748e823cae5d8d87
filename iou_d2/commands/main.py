"""`iou-d2 COMMAND`: parses the arguments of a command, and then loads and runs it."""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path

from iou_d2.commands.errors import ending_in_a_sentence
from iou_d2.commands.threads import limit_spinning
from iou_d2.dependencies import CHOICES, missing_dependency
from iou_d2.engine.memory import keep_freed_memory

# A command is the modules of its name in this folder and in parsers, with "_" for "-".
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
# What these need before they start; all others need all that iou_d2 does. They say themselves what
# else their arguments ask for.
NEEDS = {"detect": ("cv2",), "draw": ("cv2",), "install-detectron2": (), "report": ()}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return
    command, *arguments = argv
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
        sys.exit(f"iou-d2 has no command {command}. The nearest is {near}.")
    # The usage that argparse prints names the command.
    sys.argv[0] = f"iou-d2 {command}"
    run_command(command, arguments)


def run_command(command: str, argv: list[str]) -> None:
    """Run one of COMMANDS, and end in a sentence where the user can mend what is wrong.

    What does the work is imported after the arguments are parsed: torch and Detectron2 take
    seconds to load, for which neither --help nor a wrong argument has to wait.
    """
    name = module_name(command)
    with ending_in_a_sentence():
        args = importlib.import_module(f"iou_d2.commands.parsers.{name}").parse_args(argv)
        limit_spinning()
        keep_freed_memory()
        missing = missing_dependency(NEEDS.get(command, CHOICES))
        if missing:
            sys.exit(missing)
        importlib.import_module(f"iou_d2.commands.{name}").run(args)


def module_name(command: str) -> str:
    return command.replace("-", "_")


def overview() -> str:
    """The commands, each with the first line of its docstring. Imports none of them."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {command:{width}}{summary(command)}" for command in COMMANDS]
    head = "iou-d2 COMMAND ..., of which --help says what it takes:"
    return "\n".join([head, "", *lines])


def summary(command: str) -> str:
    path = Path(__file__).with_name("parsers") / f"{module_name(command)}.py"
    source = path.read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


if __name__ == "__main__":
    main()
