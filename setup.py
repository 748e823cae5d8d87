"""Builds iou_d2 with its one compiled module, for the CPU and, where a toolkit is found, CUDA.

FORCE_CUDA=1 demands the CUDA kernels, FORCE_CUDA=0 leaves them out; TORCH_CUDA_ARCH_LIST names the
GPUs to build for. Where nothing can be compiled, or with IOU_D2_NO_EXTENSION=1, PrRoI pooling runs
on plain tensor operations instead. All other metadata is in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import errors, find_packages, setup

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"iou_d2 needs setuptools 77 or newer to be built, and this is {setuptools.__version__}. "
        "Run `pip install 'setuptools>=77,<82'` (torch asks for less than 82)."
    )

NO_EXTENSION = os.environ.get("IOU_D2_NO_EXTENSION", "0") not in ("", "0")
if not NO_EXTENSION:
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        sys.exit(
            f"iou_d2 is compiled for the torch of its environment, and there is none ({error}). "
            "Install torch first, and then iou_d2 with `pip install --no-build-isolation`; or set "
            "IOU_D2_NO_EXTENSION=1."
        )

CSRC = "iou_d2/layers/csrc/"
SOURCES = [
    CSRC + name
    for name in (
        "prroi_pool.cpp",
        "prroi_pool_cpu.cpp",
        "deform_conv_cpu.cpp",
        "suppressors_cpu.cpp",
        "batch_norm_cpu.cpp",
        "conv3x3_cpu.cpp",
        "roi_align_cpu.cpp",
    )
]
CUDA_SOURCES = [CSRC + "prroi_pool_cuda.cu"]
# Without a GPU to ask, torch would build for all that it knows. T4, A100, RTX 30, H100, newer.
DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;9.0+PTX"
# Of setuptools, of torch where ninja fails, and of both where a compiler cannot be run.
BUILD_ERRORS = (
    errors.CompileError,
    errors.LinkError,
    errors.PlatformError,
    RuntimeError,
    OSError,
    subprocess.SubprocessError,
)


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


def build_ext():
    """The class of the command that compiles, and goes on without where that fails."""

    class BuildOrWarn(cpp_extension.BuildExtension):
        def build_extensions(self):
            try:
                self.check_compiler()
                super().build_extensions()
            except BUILD_ERRORS as error:
                if os.environ.get("FORCE_CUDA") == "1":
                    raise
                self.go_without(error)

        def check_compiler(self):
            """torch and ninja say of a missing compiler no more than a traceback."""
            if self.compiler.compiler_type != "unix":
                return
            for compiler in (cpp_extension.get_cxx_compiler(), self.compiler.compiler_so[0]):
                if shutil.which(compiler) is None:
                    raise errors.CompileError(f"there is no compiler {compiler}")

        def go_without(self, error):
            for extension in self.extensions:
                # What an earlier build left would be installed.
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []
            print(
                f"WARNING: the operator of iou_d2 could not be compiled ({error}). PrRoI pooling "
                "will use plain tensor operations, which are slow and need much memory.",
                file=sys.stderr,
            )

    return BuildOrWarn


setup(
    # The configs lie beside the package in a checkout and in it when it is installed.
    packages=[*find_packages(include=["iou_d2", "iou_d2.*"]), "iou_d2.configs"],
    package_dir={"iou_d2.configs": "configs"},
    ext_modules=[] if NO_EXTENSION else [extension()],
    cmdclass={} if NO_EXTENSION else {"build_ext": build_ext()},
)
