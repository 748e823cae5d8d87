"""Builds iou_d2 with its one compiled module, for the CPU and, where a toolkit is found, CUDA.

FORCE_CUDA=1 demands the CUDA kernels, FORCE_CUDA=0 leaves them out; TORCH_CUDA_ARCH_LIST names the
GPUs to build for.
"""

import os
import sys
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils import cpp_extension

CSRC = "iou_d2/layers/csrc/"
SOURCES = [CSRC + "prroi_pool.cpp", CSRC + "prroi_pool_cpu.cpp"]
CUDA_SOURCES = [CSRC + "prroi_pool_cuda.cu"]
# Without a GPU to ask, torch would build for all that it knows. T4, A100, RTX 30, H100, newer.
DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;9.0+PTX"


def why_no_cuda():
    """A sentence that says why the CUDA kernels cannot be built, or None."""
    home = cpp_extension.CUDA_HOME
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if home is None:
        return "no CUDA toolkit was found; set CUDA_HOME to the folder that holds one"
    for part in ("bin/nvcc", "include/cuda_runtime.h"):
        if not Path(home, part).exists():
            return f"{home} is no complete CUDA toolkit, {part} is missing; set CUDA_HOME"
    version = toolkit_version(home)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"the toolkit in {home} is CUDA {version} and torch is for {torch.version.cuda}"
    return None


def toolkit_version(home):
    header = Path(home, "include/cuda_runtime_api.h").read_text()
    number = int(header.split("#define CUDART_VERSION")[1].split()[0])
    return f"{number // 1000}.{number % 1000 // 10}"


def build_cuda():
    force = os.environ.get("FORCE_CUDA")
    if force not in (None, "", "0", "1"):
        sys.exit(f"FORCE_CUDA must be 0 or 1, got {force!r}.")
    if force == "0":
        return False
    reason = why_no_cuda()
    if reason is None:
        return True
    if force == "1":
        sys.exit(f"FORCE_CUDA=1, but {reason}.")
    print(f"iou_d2: building the CPU kernels only, since {reason}.", file=sys.stderr)
    return False


def extension():
    flags = {"cxx": ["/O2"] if os.name == "nt" else ["-O3"]}
    # at::parallel_for is a template: without this flag it compiles to a loop on one thread.
    if "ATen parallel backend: OpenMP" in torch.__config__.parallel_info():
        flags["cxx"].append("/openmp" if os.name == "nt" else "-fopenmp")
    if not build_cuda():
        return cpp_extension.CppExtension("iou_d2._C", SOURCES, extra_compile_args=flags)
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHITECTURES
    flags["nvcc"] = ["-O3"]
    return cpp_extension.CUDAExtension(
        "iou_d2._C", SOURCES + CUDA_SOURCES, extra_compile_args=flags
    )


setup(
    name="iou_d2",
    version="0.1.0",
    description="Detectors that know how well their boxes fit, for Detectron2",
    license="Apache-2.0",
    python_requires=">=3.9",
    packages=find_packages(include=["iou_d2", "iou_d2.*"]),
    # torch, torchvision and Detectron2 come in builds that only the user can choose.
    install_requires=["numpy", "fvcore", "pycocotools", "matplotlib"],
    extras_require={
        "eval": ["faster-coco-eval"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "onnx",
            "onnxscript",
            "onnxruntime",
        ],
    },
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
