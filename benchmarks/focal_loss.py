"""The focal loss of anchors with class labels beside fvcore's: time and memory.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/focal_loss.py [--anchors R]
        [--classes K] [--rounds N] [--device cpu|cuda]

Loss and gradient of R x K scores, of which one row of 50 has an object and one of 77 does not
count; by default those of an image of 800 x 1333. Both take turns. The peak of memory is what torch
holds beside the scores, by its own account.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss_jit
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from common import add_device, in_turn, machine
from iou_d2.engine.memory import keep_freed_memory
from iou_d2.ops.focal_loss import focal_loss_of_labels


def of_fvcore(logits: Tensor, labels: Tensor) -> Tensor:
    """As Detectron2's RetinaNet has it."""
    counted = labels >= 0
    targets = F.one_hot(labels[counted], num_classes=logits.shape[1] + 1)[:, :-1]
    return sigmoid_focal_loss_jit(
        logits[counted], targets.to(logits.dtype), alpha=0.25, gamma=2.0, reduction="sum"
    )


def loss_and_gradient(loss: Callable, logits: Tensor, labels: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
    return gradient


def peak_bytes(run: Callable, device: str) -> int:
    """Of what `run` allocates."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[ProfilerActivity.CPU, activity], profile_memory=True) as recorded:
        run()
    events = [x for x in recorded.profiler.kineto_results.events() if x.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--anchors", type=int, default=200_700, metavar="R")
    parser.add_argument("--classes", type=int, default=80, metavar="K")
    parser.add_argument("--rounds", type=int, default=7)
    add_device(parser)
    args = parser.parse_args()
    keep_freed_memory()  # as the commands do
    torch.manual_seed(0)
    logits = (2 * torch.randn(args.anchors, args.classes) - 4).to(args.device).requires_grad_()
    labels = torch.full((args.anchors,), args.classes)
    labels[::50] = torch.randint(args.classes, labels[::50].shape)
    labels[::77] = -1
    labels = labels.to(args.device)
    losses = {"fvcore": of_fvcore, "iou_d2": focal_loss_of_labels}
    runs = {name: partial(loss_and_gradient, loss, logits, labels) for name, loss in losses.items()}
    times = in_turn(runs, args.rounds)
    rows = []
    for name, run in runs.items():
        ratios = [value / base for value, base in zip(times[name], times["fvcore"])]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        milliseconds = f"{1000 * statistics.median(times[name]):.1f}"
        rows.append([name, milliseconds, spread, f"{peak_bytes(run, args.device) / 1e6:.0f}"])
    difference = (runs["fvcore"]() - runs["iou_d2"]()).abs().max().item()
    print(f"{args.anchors} x {args.classes} scores, {machine(args.device)}, {args.rounds} rounds")
    print(tabulate(rows, ["", "ms", "ratio", "MB"], "pipe", disable_numparse=True))
    print(f"Largest difference of the gradients: {difference:.1e}")


if __name__ == "__main__":
    main()
