"""Who may import whom: a folder is a floor, and files import from their own and from lower ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path("iou_d2")
DETECTION = {"torch", "torchvision", "fvcore", "detectron2"}
ARRAYS = {"numpy", "scipy", "matplotlib", "pycocotools", "faster_coco_eval"}

# Floor -> the floors below that it may import from, and what else beside the standard library.
FLOORS = {
    "errors": (set(), set()),
    "field_names": (set(), set()),
    "choices": (set(), set()),
    "resize": (set(), {"detectron2"}),
    "ops": (set(), {"torch", "torchvision", "fvcore"}),
    "layers": ({"ops", "_C"}, {"torch", "torchvision", "detectron2"}),
    "backbones": ({"ops", "layers"}, DETECTION),
    "detectors": ({"ops", "layers", "backbones"}, DETECTION | {"numpy", "cv2"}),
    "data": (set(), {"numpy", "cv2", "PIL", "tqdm", "yaml", "pycocotools", "iopath",
                     "detectron2"}),
    # Of `data` only what imports no Detectron2: see the test below.
    "analysis": ({"data"}, ARRAYS),
    "report": ({"data", "analysis"}, {"numpy", "PIL", "fiftyone"}),
    "evaluation": ({"analysis"}, {"detectron2", "numpy", "tabulate"}),
    "zoo": ({"data"}, {"yaml", "tabulate"}),
    # In use without torch and without Detectron2.
    "runtime": (set(), {"numpy", "cv2", "onnxruntime"}),
    "engine": ({"ops", "layers", "backbones", "detectors", "data", "evaluation", "runtime",
               "config_files", "__version__"},
               DETECTION | {"numpy", "iopath", "yaml", "onnx", "onnxruntime", "wandb"}),
}  # fmt: skip
# The roof may import from everywhere.
ROOF = (
    "__init__",
    "__main__",
    "config",
    "config_arithmetic",
    "config_files",
    "config_keys",
    "config_keys_dense",
    "config_merging",
    "config_reading",
    "old_keys",
    "dependencies",
    "commands",
)
# The cellar imports nothing of the house, and everything may import from it.
CELLAR = {"errors", "field_names", "choices", "resize"}


def imports_of(path: Path) -> set[str]:
    """Top names of what a file imports; of iou_d2, "iou_d2." and the first name below it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = path.with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            # `from iou_d2 import x` names modules, `from iou_d2.m import x` names what is in m.
            is_root = module == "iou_d2"
            names |= {f"{module}.{alias.name}" for alias in node.names} if is_root else {module}
    return {".".join(n.split(".")[: 2 if n.startswith("iou_d2.") else 1]) for n in names}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_from_its_floor_and_those_below(path):
    floor = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if floor in ROOF:
        return
    below, others = FLOORS[floor]
    allowed = (
        {f"iou_d2.{name}" for name in below | CELLAR | {floor}}
        | others
        | set(sys.stdlib_module_names)
    )
    assert imports_of(path) <= allowed


def test_analysis_loads_no_detectron2():
    code = "import sys, iou_d2.analysis; sys.exit('detectron2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_compat_looks_at_versions():
    others = {"__init__.py", "commands/install_detectron2.py"}  # its own, and one it prints
    for path in FILES:
        if path.name != "compat.py" and str(path.relative_to(PACKAGE)) not in others:
            assert "__version__" not in path.read_text(), path
