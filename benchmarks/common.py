"""What the benchmarks share: models, batches, and times of functions that take turns."""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from iou_d2 import get_config
from iou_d2.engine.build import build_detector


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option --device, by default the GPU where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)


def rounds_asked(doc: str, default: int) -> int:
    """What --rounds, the one option of a benchmark with this docstring, says."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=default)
    return parser.parse_args().rounds


def ratio_of(ours: Sequence[float], theirs: Sequence[float], digits: int = 2) -> str:
    """Such as "0.64 (0.60 - 0.71)", the median ratio of a round with the lowest and highest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    median, *ends = (
        f"{x:.{digits}f}" for x in (statistics.median(ratios), min(ratios), max(ratios))
    )
    return f"{median} ({' - '.join(ends)})"


def build(config_file: str, device: str, overrides: Sequence[str] = ()) -> nn.Module:
    """The model of a config, with random weights, that computes as in training and detection."""
    cfg = get_config(config_file, ["MODEL.WEIGHTS", "", "MODEL.DEVICE", device, *overrides])
    torch.manual_seed(0)
    return build_detector(cfg)


def random_batch(images: int, height: int, width: int, classes: int, objects: int = 8):
    """Detectron2's standard input: random pixels with objects of a tenth to half of the image."""
    torch.manual_seed(0)
    size, batch = torch.tensor([width, height]), []
    for _ in range(images):
        corner = torch.rand(objects, 2) * size * 0.5
        side = (0.1 + 0.4 * torch.rand(objects, 2)) * size
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        truth.gt_classes = torch.randint(classes, (objects,))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": truth, "height": height, "width": width})
    return batch


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[dict]) -> None:
    with EventStorage():
        losses = model(batch)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()


def seconds(function: Callable) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(runs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round; the runs take turns, and a first round is not counted."""
    times = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: values[1:] for name, values in times.items()}


def training_runs(models: dict[str, nn.Module], batch: list[dict]) -> dict[str, Callable]:
    """A training step of each model."""

    def run(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        return lambda: training_step(model.train(), optimizer, batch)

    return {name: run(model) for name, model in models.items()}


def inference_runs(models: dict[str, nn.Module], batch: list[dict]) -> dict[str, Callable]:
    """The inference of each model."""

    def run(model):
        return lambda: model.eval()(batch)

    return {name: run(model) for name, model in models.items()}


def forget_peak(device: str) -> None:
    """From now on `peak_gib` counts anew. On the CPU it cannot."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """The peak of what torch allocates on a GPU; on the CPU that of this process, Linux only."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # That of getrusage would count the parent's, too.
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 2**20


def machine(device: str = "cpu") -> str:
    """Such as "torch 2.11.0, 2 threads, x86_64"."""
    name = platform.processor() or platform.machine()
    if device == "cuda":
        tf32 = "in TF32" if torch.backends.cudnn.allow_tf32 else "not in TF32"
        name = f"{torch.cuda.get_device_name()}, convolutions {tf32}"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {name}"
