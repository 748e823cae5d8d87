"""What this machine can do, and each operation as a share of it.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/limits.py
        [--only machine prroi convolution models parts] [--threads N] [--rounds N]
        [--height PIXELS] [--width PIXELS] [--device cpu|cuda]

PrRoI pooling is measured by the bytes that must move (each pixel under a RoI, each bin, and in the
gradient of the features each pixel of the map, once) against the bandwidth of a copy; convolutions
and models by their multiply-adds (torch.utils.flop_counter's) against the rate of a float32 matrix
product, on a GPU in TF32. "old" is a copy into memory that was in use, "new" into memory that the
system hands out page by page; all else runs as in the commands, which keep what was freed. Medians,
with the least and the most in brackets, of runs in turn.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import prroi_pool as prroi
from common import (
    add_device,
    build,
    in_turn,
    inference_runs,
    machine,
    random_batch,
    training_runs,
)
from deform_conv import CHANNELS, levels
from flops import multiply_adds
from iou_d2.detectors.iou_net_inference import GradientAscent, Postprocessor
from iou_d2.detectors.iou_net_nms import GuidedNMS
from iou_d2.engine.memory import keep_freed_memory
from iou_d2.engine.precision import cpu_has_bfloat16
from iou_d2.layers.deform_conv import deform_conv
from iou_net import CANDIDATES, DETECTIONS, random_boxes

COPIED = {"cpu": 2**26, "cuda": 2**28}  # numbers of float32
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
DIGITS = {"cpu": 1, "cuda": 3}  # of milliseconds
CLASSES = 80
MODELS = {
    "VFNet, ResNet-50": "configs/vfnet_R_50_FPN_1x.yaml",
    "VFNet, MobileNetV2": "configs/quick/vfnet_own_data.yaml",
    "RetinaNet, ResNet-50": "configs/retinanet_R_50_FPN_1x.yaml",
    "IoU-Net, ResNet-50": "configs/iou_net_R_50_FPN_1x.yaml",
}


@dataclass(frozen=True)
class Limits:
    """Bytes a second, read and written, and float32 multiply-adds a second."""

    bandwidth: float
    rate: float


def spread(values: list[float], digits: int = 1) -> str:
    middle, *ends = (
        f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({'-'.join(ends)})"


def markdown(rows: list[list], headers: list[str]) -> None:
    print(tabulate(rows, headers, "pipe", disable_numparse=True), end="\n\n", flush=True)


def product(a: Tensor, b: Tensor, in_tf32: bool) -> None:
    """A matrix product; float32 on a GPU may be cut to TF32, as convolutions are by default."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = in_tf32
    a @ b
    torch.backends.cuda.matmul.allow_tf32 = before


def machine_runs(device: str) -> dict[str, tuple[Callable, float, str]]:
    """Name -> a run, what it does in bytes or multiply-adds, and the unit."""
    source, target = torch.ones(2, COPIED[device], device=device)
    moved = 2.0 * source.nbytes
    runs = {
        "copy, old": (lambda: target.copy_(source), moved, "GB/s"),
        "copy, new": (lambda: source.clone(), moved, "GB/s"),
    }
    side = SIDE[device]
    a, b = torch.randn(2, side, side, device=device)
    pairs = {"float32": (a, b, False)}
    if device == "cuda" or cpu_has_bfloat16():  # else it takes minutes
        pairs["bfloat16"] = (a.bfloat16(), b.bfloat16(), False)
    pairs |= {"TF32": (a, b, True)} if device == "cuda" else {}
    for name, pair in pairs.items():
        run = functools.partial(product, *pair)
        runs[f"matrix product, {name}"] = (run, float(side) ** 3, "G multiply-adds/s")
    return runs


def measure_machine(device: str, threads: list[int], rounds: int) -> Limits:
    """Prints what each number of threads can do; the limits of the last."""
    rows, speeds = [], {}
    for count in threads:
        torch.set_num_threads(count)
        runs = machine_runs(device)
        times = in_turn({name: run for name, (run, _, _) in runs.items()}, rounds)
        speeds = {name: [runs[name][1] / t / 1e9 for t in times[name]] for name in runs}
        rows += [[name, count, spread(speeds[name]), runs[name][2]] for name in runs]
    markdown(rows, ["limit", "threads", "median", "unit"])
    best = {name: 1e9 * statistics.median(values) for name, values in speeds.items()}
    of_float32 = "TF32" if device == "cuda" else "float32"
    return Limits(best["copy, old"], best[f"matrix product, {of_float32}"])


def prroi_bytes(features: Tensor, rois: Tensor) -> dict[str, float]:
    """Bytes that each step must move: what it reads and what it writes, once."""
    touched = prroi.touched_bytes(features, rois)  # pixels under RoIs, and bins
    bins = len(rois) * prroi.BINS**2 * features.shape[1] * features.element_size()
    return {"forward": touched, "features": features.nbytes + bins, "rois": touched}


def prroi_table(limits: Limits, device: str, rounds: int) -> None:
    features = torch.randn(1, prroi.CHANNELS, prroi.HEIGHT, prroi.WIDTH, device=device)
    maps = {
        "NCHW": features,
        "channels-last": features.contiguous(memory_format=torch.channels_last),
    }
    boxes = {
        "512 of 4-28 px": prroi.make_rois(512, 4, (28, 28), device),
        "1000 up to the map": prroi.make_rois(1000, 50, (prroi.WIDTH, prroi.HEIGHT), device),
    }
    rows = []
    for title, rois in boxes.items():
        runs = {
            (layout, step): run
            for layout, map_ in maps.items()
            for step, run in prroi.steps(prroi.precise, map_, rois).items()
        }
        moved = prroi_bytes(features, rois)
        times = in_turn(runs, rounds)
        for (layout, step), values in times.items():
            own = [a / b for a, b in zip(values, times[layout, "forward"])]
            share = moved[step] / statistics.median(values) / limits.bandwidth
            name = step if step == "forward" else f"backward to {step}"
            milliseconds = spread([1e3 * t for t in values], DIGITS[device])
            ratio = f"{statistics.median(own):.2f}"
            rows.append([title, layout, name, milliseconds, ratio, f"{share:.0%}"])
    markdown(rows, ["RoIs", "layout", "step", "ms", "/ forward", "of the copy bandwidth"])


def convolution_runs(device: str, height: int, width: int) -> tuple[dict[str, Callable], float]:
    """Forward and backward alone of both convolutions, and the multiply-adds of a forward pass."""
    inputs = levels(height, width, device)
    weight = (0.01 * torch.randn(CHANNELS, CHANNELS, 3, 3, device=device)).requires_grad_()
    ways = {
        "deformable convolution": lambda x, offset: deform_conv(x, offset, weight, padding=1),
        "plain convolution": lambda x, offset: F.conv2d(x, weight, padding=1),
    }
    runs = {}
    for name, way in ways.items():
        outputs = [way(x, offset) for x, offset in inputs]

        @torch.no_grad()
        def forward(way=way):
            for x, offset in inputs:
                way(x, offset)

        def backward(outputs=outputs):
            for (x, offset), y in zip(inputs, outputs):
                wanted = (x, offset, weight)
                torch.autograd.grad(
                    y, wanted, torch.ones_like(y), retain_graph=True, allow_unused=True
                )

        runs[f"{name}, forward"], runs[f"{name}, backward"] = forward, backward
    pixels = sum(x.shape[2] * x.shape[3] for x, _ in inputs)
    return runs, float(pixels * weight.numel())


def convolution_table(limits: Limits, device: str, height: int, width: int, rounds: int) -> None:
    runs, once = convolution_runs(device, height, width)
    rows = []
    for name, values in in_turn(runs, rounds).items():
        work = once * (2 if name.endswith("backward") else 1)  # to the input and to the weight
        share = work / statistics.median(values) / limits.rate
        rows.append(
            [
                name,
                spread([1e3 * t for t in values], DIGITS[device]),
                f"{work / 1e9:.1f}",
                f"{share:.0%}",
            ]
        )
    headers = [f"strides 8 to 128 of {height} x {width} px", "ms", "G multiply-adds"]
    markdown(rows, [*headers, "of the matrix rate"])


def build_models(device: str) -> dict[str, torch.nn.Module]:
    """IoU-Net with batch statistics: its heads see features of random weights."""
    norms = {"IoU-Net, ResNet-50": ("MODEL.RESNETS.NORM", "BN")}
    return {name: build(path, device, norms.get(name, ())) for name, path in MODELS.items()}


def model_table(limits: Limits, models, batch: list[dict], rounds: int) -> dict[str, float]:
    """Prints the models' shares; the median seconds of each one's training step."""
    rows, steps = [], {}
    for title, make in (("forward", inference_runs), ("training step", training_runs)):
        runs = make(models, batch)
        with torch.set_grad_enabled(title != "forward"):
            work = {name: multiply_adds(run) for name, run in runs.items()}
            times = in_turn(runs, rounds)
        steps = {name: statistics.median(values) for name, values in times.items()}
        for name, values in times.items():
            share = work[name] / steps[name] / limits.rate
            rows.append([name, title, spread(values, 4), f"{work[name] / 1e9:.1f}", f"{share:.0%}"])
    markdown(rows, ["model", "pass", "seconds", "G multiply-adds", "of the matrix rate"])
    return steps


def cut_off(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def loss_runs(model, batch: list[dict]) -> dict[str, Callable]:
    """The assignment of a dense detector, and its losses with their gradients."""
    images = model.train().preprocess_image(batch)
    truths = [x["instances"].to(model.device) for x in batch]
    # Cut off from the head, in which VarifocalNet's boxes lead into its star convolutions.
    predictions = tree_map_only(Tensor, cut_off, model.predict(images.tensor))
    outputs = [x for x in tree_leaves(predictions) if isinstance(x, Tensor) and x.requires_grad]

    def losses():
        with EventStorage():
            total = sum(model.losses(predictions, images.image_sizes, truths).values())
        torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)

    runs = {"losses with assignment": losses}
    if hasattr(model, "match"):
        points = [prediction.points for prediction in predictions]
        runs["assignment"] = lambda: model.match(points, images.image_sizes, truths)
    return runs


@torch.no_grad()
def iou_net_runs(model, batch: list[dict]) -> dict[str, Callable]:
    """IoU-guided NMS, and refinement by 5 steps without an early stop, of one image."""
    heads = model.eval().roi_heads
    images = model.preprocess_image(batch[:1])
    features = heads.levels(model.backbone(images.tensor))
    guided = Postprocessor(GuidedNMS(0.5))
    ascent = GradientAscent(steps=5, early_stop=0.0, max_drop=-float("inf"))

    def instances(count: int):
        boxes = random_boxes(count, *images.image_sizes[0]).to(model.device)
        scores = torch.rand(count, device=model.device)
        result = type(batch[0]["instances"])(images.image_sizes[0])
        result.pred_boxes = type(batch[0]["instances"].gt_boxes)(boxes)
        result.pred_classes = torch.zeros(count, dtype=torch.int64, device=model.device)
        result.scores = result.pred_ious = scores
        return [result]

    candidates, detections = instances(CANDIDATES), instances(DETECTIONS)
    return {
        f"IoU-guided NMS of {CANDIDATES} boxes": lambda: guided.suppress(candidates[0]),
        f"refinement of {DETECTIONS} boxes": lambda: ascent(detections, heads.iou_branch, features),
    }


def part_table(models, steps: dict[str, float], batch: list[dict], rounds: int) -> None:
    rows = []
    for name, model in models.items():
        runs = iou_net_runs(model, batch) if "IoU-Net" in name else loss_runs(model, batch)
        for part, values in in_turn(runs, rounds).items():
            share = statistics.median(values) / steps[name]
            milliseconds = spread([1e3 * t for t in values], DIGITS[model.device.type])
            rows.append([name, part, milliseconds, f"{share:.1%}"])
    markdown(rows, ["model", "part", "ms", "of the training step"])


def main() -> None:
    names = ("machine", "prroi", "convolution", "models", "parts")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="the machine is always measured"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--height", type=int, default=480, help="of the images, in pixels")
    parser.add_argument("--width", type=int, default=640)
    add_device(parser)
    args = parser.parse_args()
    size, only = (args.height, args.width), set(args.only)
    torch.set_num_threads(args.threads)
    print(f"{machine(args.device)}, float32, median of {args.rounds} rounds\n")
    counts = [args.threads] if args.device == "cuda" else sorted({1, args.threads})
    limits = measure_machine(args.device, counts, args.rounds)
    keep_freed_memory()  # as the commands do; "copy, new" is without it
    if "prroi" in only:
        prroi_table(limits, args.device, args.rounds)
    if "convolution" in only:
        convolution_table(limits, args.device, *size, args.rounds)
    if only & {"models", "parts"}:
        models, batch = build_models(args.device), random_batch(1, *size, CLASSES)
        steps = model_table(limits, models, batch, args.rounds)
        if "parts" in only:
            part_table(models, steps, batch, args.rounds)


if __name__ == "__main__":
    main()
