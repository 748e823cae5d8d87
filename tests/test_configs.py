"""The rules by which config files descend from one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

FILES = sorted(Path("configs").rglob("*.yaml"))
BASELINES = ("retinanet_", "faster_rcnn_", "atss_", "fcos_", "vfnet_raw_", "unitbox_facemask_l2")


def content(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def parents(path: Path) -> list[Path]:
    names = content(path).get("_BASE_", [])
    return [path.parent / name for name in ([names] if isinstance(names, str) else names)]


def ancestors(path: Path) -> set[str]:
    return {parent.name for parent in parents(path)}.union(*map(ancestors, parents(path)))


def is_base(name: str) -> bool:
    return name.startswith("Base-")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_bases_and_baselines_descend_from_no_method(path):
    allowed = BASELINES if path.name.startswith(BASELINES) else ()
    if is_base(path.name) or allowed:
        methods = {n for n in ancestors(path) if not is_base(n) and not n.startswith(allowed)}
        assert not methods, f"{path} descends from {sorted(methods)}."


def test_every_baseline_is_found_by_its_name():
    found = [path for path in FILES if path.name.startswith(BASELINES)]
    assert {name for name in BASELINES for path in found if path.name.startswith(name)} == {
        *BASELINES
    }
    assert len(found) > 20


def test_the_solver_of_the_quick_configs_is_written_once():
    quick = [path for path in FILES if path.parent.name == "quick"]
    block = set(content(Path("configs/quick/Base-Quick.yaml"))["SOLVER"])
    assert block > {"OPTIMIZER", "LR_SCHEDULER_NAME", "WEIGHT_DECAY", "CLIP_GRADIENTS"}
    for path in quick:
        if path.name != "Base-Quick.yaml":
            # Models and data differ in these two and in how long they train.
            again = block & set(content(path).get("SOLVER", {})) - {"BASE_LR", "IMS_PER_BATCH"}
            assert not again, f"{path} writes {sorted(again)} again."
            assert "Base-Quick.yaml" in ancestors(path) or is_base(path.name)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_run_has_a_folder_of_its_own(path):
    if not is_base(path.name):
        assert content(path)["OUTPUT_DIR"] == f"output/{path.stem}"
