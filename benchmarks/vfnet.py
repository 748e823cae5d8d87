"""What VarifocalNet costs beside ATSS and RetinaNet with the same ResNet-50 and FPN.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/vfnet.py [--size HxW] [--rounds N]
        [--device cpu|cuda]

The models take turns in one process. Prints the median seconds of a training step (forward,
backward, SGD) and of the inference of an image, both of one image; the ratio to RetinaNet; the peak
memory of a training step, on the CPU each in a process of its own; and which share of
VarifocalNet's step the assignment of points and the star convolutions take when they run alone. The
weights are random, so that nothing is detected.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable

import torch
from tabulate import tabulate

from common import (
    add_device,
    build,
    forget_peak,
    in_turn,
    inference_runs,
    machine,
    peak_gib,
    random_batch,
    training_runs,
    training_step,
)
from iou_d2.detectors.vfnet import star_offsets

BACKBONE = (
    *("MODEL.BACKBONE.NAME", "build_deformable_resnet_fpn_p6p7_backbone"),
    *("MODEL.RESNETS.STRIDE_IN_1X1", "False"),
)
CLASSES = 80
CONFIGS = {
    "RetinaNet": "configs/retinanet_R_50_FPN_1x.yaml",
    "ATSS": "configs/atss_R_50_FPN_1x.yaml",
    "VFNet": "configs/vfnet_R_50_FPN_1x.yaml",
}


def parts_of_vfnet(model, batch: list[dict]) -> dict[str, Callable]:
    """The assignment of points and the star convolutions, forward and backward, of one step."""
    height, width = batch[0]["image"].shape[1:]
    channels = model.head.cls_star.weight.shape[1]
    features = [
        torch.randn(1, channels, -(-height // s), -(-width // s), device=model.device)
        for s in model.grid.strides
    ]
    points = model.grid(features)
    truths = [x["instances"].to(model.device) for x in batch]

    def star_convolutions():
        for feature in features:
            feature = feature.detach().requires_grad_()
            distances = torch.full_like(feature[:, :4], 8.5).requires_grad_()
            offsets = star_offsets(distances)
            for star in (model.head.cls_star, model.head.refine_star):
                star(feature, offsets).sum().backward(retain_graph=True)

    return {
        "assignment": lambda: model.match(points, [(height, width)], truths),
        "star convolutions": star_convolutions,
    }


def peak_megabytes(config_file: str, device: str, size: tuple[int, int]) -> float:
    """Of a training step; on the CPU with what the process takes to start."""
    forget_peak(device)
    model = build(config_file, device, BACKBONE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    training_step(model.train(), optimizer, random_batch(1, *size, CLASSES))
    return 1024 * peak_gib(device)


def peaks_of(device: str, size: tuple[int, int]) -> list[float]:
    """Of each config; a process on the CPU cannot forget its peak."""
    work = [(path, device, size) for path in CONFIGS.values()]
    if device == "cuda":
        return [peak_megabytes(*of_config) for of_config in work]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return [pool.apply(peak_megabytes, of_config) for of_config in work]


def table(device: str, size: tuple[int, int], rounds: int) -> None:
    peaks = peaks_of(device, size)
    batch = random_batch(1, *size, CLASSES)
    models = {name: build(path, device, BACKBONE) for name, path in CONFIGS.items()}
    training = in_turn(training_runs(models, batch), rounds)
    with torch.no_grad():
        inference = in_turn(inference_runs(models, batch), rounds)
    parts = in_turn(parts_of_vfnet(models["VFNet"], batch), rounds)
    step = statistics.median(training["VFNet"])
    del models

    rows = []
    for name, peak in zip(CONFIGS, peaks):
        row = [name]
        for times in (training, inference):
            ratio = statistics.median(a / b for a, b in zip(times[name], times["RetinaNet"]))
            row += [f"{statistics.median(times[name]):.3f}", f"{ratio:.2f}"]
        rows.append([*row, f"{peak:.0f}"])
    headers = ["{}x{}".format(*size), "step (s)", "ratio", "inference (s)", "ratio", "peak (MB)"]
    print(tabulate(rows, headers, "pipe", disable_numparse=True))
    for name, times in parts.items():
        print(f"{name}: {statistics.median(times):.4f} s, {statistics.median(times) / step:.1%}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="*", default=["480x640", "800x1333"], metavar="HxW")
    parser.add_argument("--rounds", type=int, default=3)
    add_device(parser)
    arguments = parser.parse_args()
    print(f"{machine(arguments.device)}, float32, 1 image, median of {arguments.rounds} rounds\n")
    for size in arguments.size:
        height, width = map(int, size.split("x"))
        table(arguments.device, (height, width), arguments.rounds)


if __name__ == "__main__":
    main()
