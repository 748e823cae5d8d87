"""Times ATSS and FCOS assignment beside the dense way, the full matrix of points and boxes.

    python benchmarks/assign.py [--objects 500] [--largest PIXELS] [--threads 2] [--runs 15]
        [--device cpu|cuda]

Prints the best and the median milliseconds of an image, the processor's (of all threads, for busy
machines) and the peak of memory on top of what is held before. The two ways take turns, and must
assign alike; on a GPU rounding may decide otherwise about one point in a thousand. Linux only: on
the CPU the peak comes from /proc.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torchvision.ops import box_iou

from common import add_device, forget_peak, machine, peak_gib
from iou_d2.ops.assign import ATSSAssigner, FCOSAssigner
from iou_d2.ops.points import PointGrid

STRIDES = (8, 16, 32, 64, 128)
HEIGHT, WIDTH = 800, 1333


def random_image(objects: int, largest: float) -> tuple[list[Tensor], Tensor]:
    """Feature maps of an image, and boxes whose sides are log-uniform from 8 px to `largest`."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.zeros(1, 1, math.ceil(HEIGHT / s), math.ceil(WIDTH / s)) for s in STRIDES]
    center = torch.rand(objects, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    half = 4 * (largest / 8) ** torch.rand(objects, 2, generator=generator)
    return features, torch.cat([center - half, center + half], dim=1)


def side_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """(R, G, 4), or (C, G, 4) of points (C, G, 2)."""
    points = points if points.dim() == 3 else points[:, None]
    return torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], dim=-1)


def dense_atss(assigner: ATSSAssigner, points: list[Tensor], strides, boxes: Tensor) -> Tensor:
    counts = [len(level) for level in points]
    everywhere = torch.cat(points)
    sides = torch.tensor(strides).repeat_interleave(torch.tensor(counts)) * assigner.anchor_scale
    half = sides.to(everywhere.device) / 2
    ious = box_iou(torch.cat([everywhere - half[:, None], everywhere + half[:, None]], 1), boxes)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    distances = (everywhere[:, None] - centers).square().sum(dim=-1).sqrt()
    nearest = [
        level.topk(min(assigner.topk, len(level)), dim=0, largest=False).indices
        for level in distances.split(counts)
    ]
    starts = [sum(counts[:level]) for level in range(len(counts))]
    candidates = torch.cat([index + start for index, start in zip(nearest, starts)])
    chosen = ious.gather(0, candidates)
    positive = side_distances(everywhere[candidates], boxes).amin(dim=-1) > 0.01
    positive &= chosen >= chosen.mean(dim=0) + chosen.std(dim=0)
    claims = torch.full_like(ious, -1).scatter_(0, candidates, chosen.where(positive, -1))
    highest, match = claims.max(dim=1)
    return match.where(highest >= 0, -1)


def dense_fcos(assigner: FCOSAssigner, points: list[Tensor], strides, boxes: Tensor) -> Tensor:
    everywhere = torch.cat(points)
    device = everywhere.device
    counts = torch.tensor([len(level) for level in points], device=device)
    limits = torch.tensor(assigner.ranges, device=device).repeat_interleave(counts, dim=0)
    distances = inner = side_distances(everywhere, boxes)
    if assigner.center_sampling_radius is not None:
        sides = torch.tensor(strides, device=device).repeat_interleave(counts)
        radius = sides * assigner.center_sampling_radius
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        apart = (everywhere[:, None] - centers).abs().amax(dim=-1)
        inner = torch.cat([distances, (radius[:, None] - apart)[..., None]], dim=-1)
    farthest = distances.amax(dim=-1)
    taken = (inner.amin(dim=-1) > 0) & (farthest >= limits[:, :1]) & (farthest <= limits[:, 1:])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    smallest, match = torch.where(taken, areas, torch.inf).min(dim=1)
    return match.where(smallest < torch.inf, -1)


def megabytes(field: str) -> float:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) / 1024


def peak_memory(assign, features: list[Tensor], boxes: Tensor, grid: PointGrid) -> float:
    """MB of one call; on the CPU for a process of its own, whose allocator holds nothing yet."""
    points = grid(features)
    if boxes.is_cuda:
        forget_peak("cuda")
        before = torch.cuda.memory_allocated() / 2**20
        assign(points, STRIDES, boxes)
        return 1024 * peak_gib("cuda") - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = megabytes("VmRSS")
    assign(points, STRIDES, boxes)
    return megabytes("VmHWM") - before


def peak_memory_alone(*arguments) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, arguments)


def milliseconds(assign, device: str) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    assign()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=int, default=500)
    parser.add_argument("--largest", type=float, default=HEIGHT, help="side of a box, pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    add_device(parser)
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(arguments.threads)

    features, boxes = random_image(arguments.objects, arguments.largest)
    features, boxes = [x.to(device) for x in features], boxes.to(device)
    memory_of = peak_memory if device == "cuda" else peak_memory_alone
    rows = []
    corners, middles = PointGrid(STRIDES, 0.0), PointGrid(STRIDES, 0.5)
    for name, assigner, grid, dense in (
        ("ATSS", ATSSAssigner(), corners, dense_atss),
        ("FCOS", FCOSAssigner(), middles, dense_fcos),
        ("FCOS, centers", FCOSAssigner(center_sampling_radius=1.5), middles, dense_fcos),
    ):
        points = grid(features)
        ways = {f"{name}, dense": partial(dense, assigner), name: assigner}
        expected, found = (way(points, STRIDES, boxes) for way in ways.values())
        differ = (found != expected).float().mean().item()
        assert differ <= (1e-3 if device == "cuda" else 0), f"{name} assigns unlike the dense way."
        times = [
            [milliseconds(partial(way, points, STRIDES, boxes), device) for way in ways.values()]
            for _ in range(arguments.runs)
        ]
        for (label, way), measured in zip(ways.items(), zip(*times)):
            wall, processor = zip(*measured)
            memory = memory_of(way, features, boxes, grid)
            rows.append([label, min(wall), statistics.median(wall), min(processor), memory])
    print(
        f"{arguments.objects} objects, {sum(map(len, points))} points, {machine(device)}, "
        f"{arguments.runs} runs"
    )
    headers = ["", "best ms", "median ms", "processor ms", "peak MB"]
    print(tabulate(rows, headers, "pipe", floatfmt=".3g"))


if __name__ == "__main__":
    main()
