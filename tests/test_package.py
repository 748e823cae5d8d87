"""What installing and importing iou_d2 does, each in a fresh process."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

# Where a module has another name than what brings it, and what only the user can choose.
PACKAGES = {"PIL": "Pillow", "yaml": "PyYAML", "faster_coco_eval": "faster-coco-eval"}
CHOSEN_BY_THE_USER = {"torch", "torchvision", "detectron2", "cv2"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.getcwd(), **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)


def python(program: str) -> str:
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def loaded_by(statement: str, modules: set[str]) -> set[str]:
    return set(python(f"{statement}; import sys; print(*({modules!r} & set(sys.modules)))").split())


def test_importing_a_part_loads_no_more_than_it_needs():
    heavy = {"torch", "detectron2", "cv2", "scipy", "matplotlib"}
    assert loaded_by("import iou_d2", heavy | {"iou_d2.config"}) == set()
    parts = ", ".join(f"iou_d2.ops.{path.stem}" for path in Path("iou_d2/ops").glob("[!_]*.py"))
    assert "iou_d2.ops.boxes" in parts
    assert loaded_by(f"import {parts}", heavy - {"scipy"}) == {"torch"}


WAYS_TO_THE_CONFIG = (
    "from iou_d2 import add_iou_config",
    "import iou_d2; iou_d2.get_config",
    "import iou_d2.config",
)


def test_all_is_registered_with_the_config():
    """Each way in a fork of a process that has loaded Detectron2, which takes seconds."""
    program = f"""import os
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
for statement in {WAYS_TO_THE_CONFIG}:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        continue
    exec(statement)
    for registry in (BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY):
        ours = (name for name, entry in registry if entry.__module__.startswith("iou_d2"))
        print(*ours, flush=True)
    os._exit(0)
import iou_d2.commands.train, sys
print(*({{"matplotlib", "scipy", "onnx"}} & set(sys.modules)))"""
    *lines, unneeded = python(program).split("\n")
    assert unneeded == ""  # by a training, which would start later
    assert len(lines) == 3 * len(WAYS_TO_THE_CONFIG)
    for backbones, detectors, heads in zip(lines[0::3], lines[1::3], lines[2::3]):
        assert "build_vgg16_backbone" in backbones.split()
        assert {"IoUAwareRetinaNet", "UnitBox"} <= set(detectors.split())
        assert "IoUNetROIHeads" in heads.split()


def test_an_unknown_name_is_an_attribute_error():
    done = run("-c", "import iou_d2; iou_d2.get_confg")
    assert "AttributeError: The module iou_d2 has no attribute get_confg." in done.stderr


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("cv2", "iou_d2 needs OpenCV, which is not installed. Run `pip install opencv-python-head"),
        ("detectron2", "iou_d2 needs Detectron2, which is not installed. Run `iou-d2 install-dete"),
        ("torch", "iou_d2 needs torch, which is not installed. Install torch and torchvision as"),
    ],
)
def test_what_is_missing_is_named_in_a_sentence(module, sentence):
    hide = f"import sys; sys.modules[{module!r}] = None\n"
    done = run("-c", hide + "from iou_d2 import get_config")
    assert f"ImportError: {sentence}" in done.stderr
    analyze = ["analyze", "--gt", "x", "--results", "x", "--output", "x"]
    done = run("-c", hide + f"from iou_d2.commands.main import main; main({analyze})")
    assert done.stderr.startswith(sentence) and "Traceback" not in done.stderr


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_every_import_is_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    of_users = ("eval", "export", "runtime", "fiftyone", "wandb")
    declared = set(project["dependencies"]).union(*(extras[name] for name in of_users))
    files = [*Path("iou_d2").rglob("*.py"), Path("train_net.py"), Path("demo.py")]
    imported = set().union(*map(imported_modules, files))
    imported -= set(sys.stdlib_module_names) | CHOSEN_BY_THE_USER | {"iou_d2"}
    assert {PACKAGES.get(name, name) for name in imported} == declared


def test_the_version_stands_in_one_place():
    version = python("import iou_d2; print(iou_d2.__version__)")
    done = run("setup.py", "--version", IOU_D2_NO_EXTENSION="1")
    assert done.stdout.strip().splitlines()[-1] == version
    assert all(version not in Path(name).read_text() for name in ("setup.py", "pyproject.toml"))


def test_a_build_without_the_extension_has_every_module_and_config(tmp_path):
    done = run("setup.py", "-q", "build", "-b", str(tmp_path), IOU_D2_NO_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path / "lib") for path in tmp_path.rglob("*") if path.is_file()}
    modules = set(Path("iou_d2").rglob("*.py"))
    page = {Path("iou_d2/report", name) for name in ("page.html", "style.css", "script.js")}
    configs = {Path("iou_d2", path) for path in Path("configs").rglob("*.yaml")}
    assert built == modules | configs | page


@pytest.mark.parametrize("compiler", ["nowhere", "false"])
def test_a_build_that_fails_warns_once_and_goes_on(tmp_path, compiler):
    folders = ["-t", str(tmp_path), "-b", str(tmp_path)]
    left = tmp_path / "iou_d2" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    left.parent.mkdir()
    left.touch()  # by an earlier build
    environment = {"CC": compiler, "CXX": compiler, "FORCE_CUDA": "0"}
    done = run("setup.py", "-q", "build_ext", *folders, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING: the operator of iou_d2 could not be compiled (") == 1
    assert "Traceback" not in done.stderr
    assert not left.exists()


def test_cuda_kernels_that_are_demanded_have_to_be_built(tmp_path):
    folders = ["-t", str(tmp_path), "-b", str(tmp_path)]
    done = run("setup.py", "-q", "build_ext", *folders, FORCE_CUDA="1", CC="nowhere", CXX="nowhere")
    assert done.returncode != 0
    assert "FORCE_CUDA=1, but" in done.stderr or "there is no compiler nowhere" in done.stderr


@pytest.mark.skipif(not Path(".git").exists(), reason="needs a checkout")
@pytest.mark.parametrize("folder", [".venv", ".venv-git"])
def test_git_and_so_the_linter_ignore_the_environments_of_make(folder):
    assert subprocess.run(["git", "check-ignore", "-q", f"{folder}/x.py"]).returncode == 0
