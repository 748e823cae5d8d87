"""`iou-d2 install-detectron2`: mends and installs release 0.5, or builds upstream main."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from iou_d2.commands.parsers.install_detectron2 import parse_args

SDIST = "detectron2-cdo==0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
SETUPTOOLS = "setuptools>=77,<82"  # 82 has no pkg_resources, which Detectron2 main imports
UPSTREAM = "https://github.com/facebookresearch/detectron2"


class Replacement(NamedTuple):
    """`old` becomes `new` in `file`, at exactly `count` places."""

    file: str
    old: str
    new: str
    count: int


NO_C = "from detectron2 import _no_C as _C"
REPLACEMENTS = [
    # NumPy 1.24 took the aliases of Python's own types away.
    Replacement("data/build.py", "np.int)", "int)", 1),
    Replacement("data/build.py", "np.int\n", "int\n", 1),
    Replacement("data/datasets/pascal_voc.py", "np.str)", "str)", 1),
    Replacement("evaluation/pascal_voc_evaluation.py", "np.bool)", "bool)", 2),
    Replacement("evaluation/sem_seg_evaluation.py", "np.int)", "int)", 2),
    Replacement("evaluation/sem_seg_evaluation.py", "np.float)", "float)", 5),
    Replacement("structures/masks.py", "np.bool)", "bool)", 2),
    Replacement("utils/video_visualizer.py", "np.bool)", "bool)", 1),
    Replacement("utils/visualizer.py", "np.bool)", "bool)", 3),
    # Pillow 10 took Image.LINEAR away.
    Replacement("data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR", 1),
    # setuptools 82 took pkg_resources away.
    Replacement("model_zoo/model_zoo.py", "import pkg_resources\n", "", 1),
    Replacement(
        "model_zoo/model_zoo.py",
        "pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'os.path.join(os.path.dirname(__file__), "configs", config_path)',
        1,
    ),
    # torch 2 has no Caffe2, and wants the indexing of meshgrid in words.
    Replacement("export/__init__.py", "from .api import *\n", "", 1),
    Replacement(
        "modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        1,
    ),
    # The sdist has no C++ sources.
    Replacement("evaluation/fast_eval_api.py", "from detectron2 import _C", NO_C, 1),
    Replacement("layers/deform_conv.py", "from detectron2 import _C", NO_C, 1),
    Replacement("layers/roi_align_rotated.py", "from detectron2 import _C", NO_C, 1),
    Replacement("layers/rotated_boxes.py", "from detectron2 import _C", NO_C, 1),
]

NO_C_MODULE = f'''"""Stands where the compiled operators would be: each raises when it is called."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise RuntimeError(
            f"detectron2._C.{{name}} is a compiled operator, and this Detectron2 0.5 was installed "
            "without them. Detectron2 main, from {UPSTREAM}, builds them."
        )

    return missing
'''

WHEEL_SETUP = """
from setuptools import find_packages, setup

setup(
    name="detectron2",
    version="0.5",
    packages=find_packages(include=["detectron2*"]),
    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py", "configs/*.*"]},
    license_files=["LICENSE"],
    install_requires=[
        "Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8",
        "tabulate", "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.7,<0.1.10", "omegaconf>=2.1", "hydra-core>=1.1",
    ],
)
"""


def mend(package: Path, replacements: list[Replacement]) -> None:
    """Apply `replacements` under `package`; another number of places than expected stops."""
    for file, old, new, count in replacements:
        path = package / file
        text = path.read_text()
        found = text.count(old)
        if found != count:
            sys.exit(
                f"{file} of {SDIST} has {old!r} at {found} places where {count} were expected, so "
                "nothing was installed."
            )
        path.write_text(text.replace(old, new))


def pip(*arguments: str, version_in: Path | None = None) -> None:
    """Run the pip of this environment, or the one in the folder `version_in`."""
    environment = {**os.environ, "PYTHONPATH": str(version_in)} if version_in else None
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], env=environment)
    if done.returncode != 0:
        sys.exit(f"`pip {arguments[0]}` failed, for the reason above: no Detectron2 was installed.")


def prepare_build() -> None:
    """Detectron2's setup.py needs torch, so it is built with the setuptools of this environment,
    which has to know how wheels are made. Those of Python 3.9 to 3.11 do not."""
    if importlib.util.find_spec("torch") is None:
        sys.exit("Detectron2 needs torch, which is not installed. Install torch first.")
    try:
        major = int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        major = 0
    if major < 77:
        pip("install", "--quiet", SETUPTOOLS)


def installed_detectron2() -> str | None:
    """Describe the Detectron2 of this environment, None where there is none; a broken one stops."""
    probe = (
        "import importlib.util as u, sys\n"
        "if u.find_spec('detectron2') is None: sys.exit(3)\n"
        "import detectron2.engine as e, detectron2 as d\n"
        "print(d.__version__, 'at', d.__path__[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if done.returncode == 3:
        return None
    if done.returncode != 0:
        sys.exit(
            f"The Detectron2 of this environment does not import:\n{done.stderr}"
            "Remove it (pip uninstall detectron2) or mend it, and run this again."
        )
    return done.stdout.strip().splitlines()[-1]


def install_release(work: Path) -> None:
    """Download, check, mend, build and install Detectron2 0.5 in the empty folder `work`."""
    wanted = work / "sdist.txt"
    wanted.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
    # pip checks the hash before it runs any of the sdist; setup.py needs the torch that is here.
    flags = ["--no-deps", "--no-build-isolation", "--no-binary=:all:", "--require-hashes"]
    # Later ones refuse the sdist for a requirement that it names, and that is not wanted here.
    older_pip = work / "pip"
    pip("install", "--quiet", "--target", str(older_pip), "pip<26")
    pip("download", "--quiet", *flags, "-r", str(wanted), "-d", str(work), version_in=older_pip)

    with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
        archive.extractall(work, filter="data")
    source = next(path.parent for path in work.glob("*/detectron2"))
    package = source / "detectron2"
    mend(package, REPLACEMENTS)
    (package / "_no_C.py").write_text(NO_C_MODULE)
    (source / "setup.py").write_text(WHEEL_SETUP)

    build = ["--no-deps", "--no-build-isolation", "--no-cache-dir"]
    pip("wheel", "--quiet", *build, "-w", str(work), str(source))
    pip("install", "--quiet", str(next(work.glob("detectron2-*.whl"))))


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    present = installed_detectron2()
    if present is not None:
        print(f"Detectron2 {present} is left as it is.")
        return
    prepare_build()
    if args.git:
        pip("install", "--no-build-isolation", f"git+{UPSTREAM}")
    else:
        with tempfile.TemporaryDirectory() as work:
            install_release(Path(work))
    print(f"Installed Detectron2 {installed_detectron2()}.")
