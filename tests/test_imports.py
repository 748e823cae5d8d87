"""Who may import whom: the table of the architecture, read off the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path("iou_d2")
METHODS = {"iou_net", "retinanet", "unitbox", "vfnet"}
MATHS = {"torch", "torchvision", "fvcore", "boxes"}
SHARED = {
    "box_losses",
    "pooler",
    "dense",
    "deform",
    "faster_rcnn",
    "pixels",
    "point_heads",
    "postprocess",
    "visualize",
    "jitter",
}
ANY_ARRAY = {"numpy", "scipy", "matplotlib", "pycocotools", "boxes"}
DATA = {"numpy", "cv2", "PIL", "tqdm", "pycocotools", "iopath", "detectron2"}

# Package or module of iou_d2 -> what it may import beside the standard library and itself.
MAY_IMPORT = {
    "__init__": METHODS | SHARED | {"config", "point_detector", "resnet10", "vgg"},
    "boxes": {"torch"},
    **dict.fromkeys(("assign", "box_losses", "losses"), MATHS),
    "faster_rcnn": {"torch", "detectron2", "box_losses"},
    "layers": MATHS | {"_C"},
    **dict.fromkeys(("nms", "refine", "jitter"), MATHS),
    "postprocess": MATHS | {"detectron2", "nms", "refine"},
    "pooler": MATHS | {"detectron2", "layers"},
    "dense": MATHS | {"detectron2", "losses", "assign", "nms", "refine", "layers"},
    **{method: MATHS | SHARED | {"detectron2", "layers"} for method in METHODS},
    "config": {"torch", "yaml", "detectron2"},
    "convert": {"torch"},
    "deform": MATHS | {"detectron2"},
    "compat": {"torch", "detectron2"},
    "point_heads": {"torch", "detectron2", "deform"},
    "point_detector": MATHS
    | {"detectron2", "assign", "box_losses", "dense", "losses", "point_heads", "visualize"},
    "pixels": {"torch", "cv2", "numpy", "detectron2", "dense"},
    "safe_load": {"numpy", "torch"},
    "solver": {"torch", "detectron2"},
    "vgg": {"torch", "torchvision", "detectron2"},
    "resnet10": {"detectron2"},
    "visualize": {"numpy", "detectron2"},
    "data": DATA,
    "evaluation": ANY_ARRAY | {"torch", "tabulate", "faster_coco_eval", "detectron2", "analysis"},
    "analysis": ANY_ARRAY,
}


def imports_of(path: Path) -> set[str]:
    """Top names of what a file imports; of iou_d2, the first name below it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = path.with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            # `from . import x` names modules, `from .m import x` names what is in m.
            names |= {f"{module}.{a.name}" for a in node.names} if not node.module else {module}
    return {n.split(".")[1] if n.startswith("iou_d2.") else n.split(".")[0] for n in names}


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_its_place_allows(path):
    unit = unit_of(path)
    assert unit in MAY_IMPORT, f"{path} has no row in MAY_IMPORT."
    allowed = MAY_IMPORT[unit] | {unit} | set(sys.stdlib_module_names)
    assert imports_of(path) <= allowed


def test_methods_never_import_each_other():
    for method in METHODS:
        assert not imports_of(PACKAGE / f"{method}.py") & (METHODS - {method})


def test_only_compat_looks_at_versions():
    for path in FILES:
        if path.name != "compat.py" and path != PACKAGE / "__init__.py":
            assert "__version__" not in path.read_text(), path
