"""Times PrRoI pooling beside torchvision's roi_align, and checks CUDA against the CPU.

    python benchmarks/prroi_pool.py [--threads 2] [--runs 15]
    python benchmarks/prroi_pool.py --device cuda --check [--published DIR]

DIR is the `pytorch/prroi_pool` folder of the published kernel
(github.com/vacancy/PreciseRoIPooling), which compiles itself on first use. Runs of all rows are
interleaved and medians reported, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torchvision.ops import roi_align

from iou_d2.layers import HAS_EXTENSION, prroi_pool

STRIDE, HEIGHT, WIDTH, CHANNELS, BINS = 4, 200, 304, 256, 7


def make_rois(count: int, smallest: float, largest: tuple[float, float], device: str):
    """(count, 5) RoIs in input pixels, whose sides are uniform between two numbers of feature
    pixels."""
    generator = torch.Generator().manual_seed(0)
    sides = smallest + torch.rand(count, 2, generator=generator) * (
        torch.tensor(largest) - smallest
    )
    start = torch.rand(count, 2, generator=generator) * (torch.tensor([WIDTH, HEIGHT]) - sides)
    boxes = torch.cat([torch.zeros(count, 1), start, start + sides], 1)
    return (boxes * torch.tensor([1.0, *[STRIDE] * 4])).to(device)


def align(features, rois):
    return roi_align(features, rois.to(features.dtype), BINS, 1 / STRIDE, 2, True)


def precise(features, rois):
    return prroi_pool(features, rois, BINS, 1 / STRIDE, True)


def load_published(folder: str) -> Callable:
    """The published op as a function of (features, rois); it knows float32 and aligned=False
    only."""
    sys.path.insert(0, str(Path(folder).resolve().parent))
    module = importlib.import_module(f"{Path(folder).name}.functional")
    return lambda features, rois: module.prroi_pool2d(features, rois, BINS, BINS, 1 / STRIDE)


def steps(op: Callable, features: torch.Tensor, rois: torch.Tensor) -> dict[str, Callable]:
    """The forward pass and one function for each gradient that `op` has."""
    inputs = {"features": features.clone().requires_grad_()}
    if op is not align:
        inputs["rois"] = rois.clone().requires_grad_()
    result = {"forward": lambda: op(features, rois)}
    for name, tensor in inputs.items():
        args = {"features": features, "rois": rois, name: tensor}
        out = op(**args) if op in (align, precise) else op(args["features"], args["rois"])
        grad = torch.randn_like(out)
        result[name] = lambda out=out, tensor=tensor, grad=grad: torch.autograd.grad(
            out, tensor, grad, retain_graph=True
        )
    return result


def timed(function: Callable, device: str) -> float:
    """Milliseconds; on CUDA those of the GPU, which sleeps until it has been told all it has to do:
    else these steps would be as long as Python takes for that."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(4_000_000)  # cycles, about 2 ms
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def medians(functions: dict, device: str, runs: int) -> dict:
    times = {key: [] for key in functions}
    for _ in range(runs):
        for key, function in functions.items():
            function()  # not timed: its inputs come into the caches, as a backbone would leave them
            times[key].append(timed(function, device))
    return {key: statistics.median(values) for key, values in times.items()}


def touched_bytes(features: torch.Tensor, rois: torch.Tensor) -> int:
    """Bytes that pooling must move: each pixel under any RoI once, and the output."""
    covered = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    for x1, y1, x2, y2 in (rois[:, 1:].cpu() / STRIDE - 0.5).tolist():
        covered[max(int(y1), 0) : int(y2) + 2, max(int(x1), 0) : int(x2) + 2] = True
    elements = int(covered.sum()) + len(rois) * BINS * BINS
    return elements * CHANNELS * features.element_size()


def copy_bandwidth(device: str, runs: int) -> float:
    """Bytes a second, read and written, of copying 256 MiB."""
    source = torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    milliseconds = medians({"copy": lambda: target.copy_(source)}, device, runs)["copy"]
    return 2 * source.numel() * source.element_size() / milliseconds * 1e3


def check(device: str) -> None:
    """Raises AssertionError if a device's outputs or gradients differ from float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    rois = torch.cat([make_rois(64, 0.5, (40, 40), "cpu"), make_rois(8, 100, (800, 800), "cpu")])
    rois[:, 0] = torch.arange(len(rois)) % 2
    rois[0, 3] = rois[0, 1]
    rois[1, 1] = float("nan")
    rois[2, 3] = 1e6
    tolerances = {
        torch.float64: 1e-6,
        torch.float32: 1e-3,
        torch.float16: 5e-2,
        torch.bfloat16: 3e-1,
    }
    for dtype, tolerance in tolerances.items():
        for channels in (3, 64, 256):
            features = torch.randn(2, channels, 50, 76, generator=generator).to(dtype)
            for layout in (torch.contiguous_format, torch.channels_last):
                for size in ((7, 7), (14, 14), (1, 3)):
                    values = features.contiguous(memory_format=layout)
                    want = gradients(values.double(), rois.double(), size, "cpu")
                    got = gradients(values, rois, size, device)
                    for name, a, b in zip(("output", "features", "rois"), got, want):
                        error = (a.cpu().double() - b).abs().max() / b.abs().max()
                        assert error <= tolerance, f"{name} {dtype} {layout} {size}: {error:.1e}"
    print(f"{device}: outputs and gradients agree with float64 on the CPU")


def gradients(features, rois, size, device):
    features = features.detach().to(device).requires_grad_()
    rois = rois.to(device).requires_grad_()
    out = prroi_pool(features, rois, size, 1 / STRIDE, True)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return (out.detach(), *torch.autograd.grad(out, (features, rois), weight.to(out)))


def report(device: str, dtype: torch.dtype, runs: int, published: Callable | None) -> None:
    maps = {"NCHW": torch.randn(1, CHANNELS, HEIGHT, WIDTH, device=device, dtype=dtype)}
    maps["channels-last"] = maps["NCHW"].contiguous(memory_format=torch.channels_last)
    boxes = {
        "512 RoIs of 4-28 px": make_rois(512, 4, (28, 28), device),
        "1000 RoIs up to the map": make_rois(1000, 50, (WIDTH, HEIGHT), device),
    }
    peers = [("published", published)] if published and dtype == torch.float32 else []
    for title, rois in boxes.items():
        functions = {}
        for name, op in [("roi_align", align), *peers]:
            for step, function in steps(op, maps["NCHW"], rois).items():
                functions[name, "NCHW", step] = function
        for layout, features in maps.items():
            for step, function in steps(precise, features, rois).items():
                functions["prroi_pool", layout, step] = function
        result = medians(functions, device, runs)
        moved = touched_bytes(maps["NCHW"], rois)
        print(f"\n{title}, {dtype}, {CHANNELS} x {HEIGHT} x {WIDTH} -> {BINS} x {BINS}")
        print("| op | layout | step | ms | / roi_align | / own forward | GB/s that must move |")
        print("|---|---|---|---|---|---|---|")
        for (name, layout, step), ms in result.items():
            peer = result.get(("roi_align", "NCHW", step))
            ratio = "-" if peer is None else f"{ms / peer:.3f}"
            own = ms / result[name, layout, "forward"]
            speed = f"{moved / ms / 1e6:.1f}" if step == "forward" else "-"
            print(f"| {name} | {layout} | {step} | {ms:.2f} | {ratio} | {own:.2f} | {speed} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="compare with float64 on the CPU")
    parser.add_argument("--published", metavar="DIR", help="folder of the published kernel")
    args = parser.parse_args()
    if not HAS_EXTENSION:
        sys.exit("iou_d2's operator is not compiled, so there is nothing to time.")
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"{machine}, {versions}, {torch.get_num_threads()} threads, median of {args.runs} runs")
    print(f"copy bandwidth {copy_bandwidth(args.device, args.runs) / 1e9:.1f} GB/s")
    if args.check:
        check(args.device)
    published = load_published(args.published) if args.published else None
    dtypes = [torch.float32] if args.device == "cpu" else [torch.float32, torch.float16]
    for dtype in dtypes:
        report(args.device, dtype, args.runs, published)


if __name__ == "__main__":
    main()
