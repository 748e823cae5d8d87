"""The benchmarks that have a meaning on a GPU, in one process, which loads the libraries once.

    python tools/benchmark_gpu.py

Those of most worth come first. One that fails is named at the end, and the others run.
"""

from __future__ import annotations

import gc
import runpy
import sys
import time
import traceback
from pathlib import Path

import torch

from iou_d2.layers.extension import DEVICES

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = (
    "prroi_pool.py --runs 10 --check",
    "limits.py --rounds 5",
    "iou_net.py --rounds 3",
    "peers.py --rounds 3 --library torchvision",
    "precision.py --rounds 4",
    "vfnet.py --size 800x1333 --rounds 3",
    "memory.py",
    "focal_loss.py --rounds 5",
    "deform_conv.py --rounds 5",
    "assign.py --runs 5",
    "retinanet.py --rounds 10",
    "ssd.py --rounds 3",
    "unitbox.py",
)


def run(script: str, *arguments: str) -> bool:
    """Whether it went well."""
    before = sys.argv
    sys.argv = [script, *arguments, "--device", "cuda"]
    try:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    except Exception:
        traceback.print_exc()
        return False
    finally:
        sys.argv = before
        gc.collect()
        torch.cuda.empty_cache()
    return True


def main() -> None:
    if "cuda" not in DEVICES:
        sys.exit("iou_d2 was compiled without CUDA: install it with FORCE_CUDA=1 (README.md).")
    sys.path.insert(0, str(FOLDER))
    failed = []
    for line in SCRIPTS:
        print(f"\n## {line}\n", flush=True)
        start = time.perf_counter()
        if not run(*line.split()):
            failed.append(line)
        print(f"\n{time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"These failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
