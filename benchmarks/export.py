"""What exported detectors save: PyTorch eager beside TorchScript, ONNX Runtime and OpenVINO, in
float32 and in 8 bits.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/export.py [--size HxW ...] [--rounds N]
        [--models NAME ...] [--threads N]
    python benchmarks/export.py --config output/x/config.yaml --weights output/x/model_final.pth \\
        --calibrate FOLDER [--images N] [--test NAME] [--keep FOLDER]

All run on one image of the size of their file, in turns in one process. Prints the median of their
seconds with the quartiles, the ratio to eager, the median of those of the rounds, and how many
detections each gives. Without --weights they are random, nothing is detected, and so NMS is free.

--calibrate is a folder of pictures from which 8 bits get their ranges; without it they come from
noise, which changes no time. --test evaluates the files for images of any size as `iou-d2 eval
--model` does, and prints what 8 bits cost. OpenVINO takes part where it is installed: in float32,
in bfloat16, which it takes by itself on a CPU that multiplies it, and with the file of 8 bits.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor, nn

from common import in_turn, machine
from iou_d2 import get_config
from iou_d2.commands.eval import main as evaluate
from iou_d2.commands.trained import load_trained
from iou_d2.engine.build import as_configured
from iou_d2.engine.export import build_graph
from iou_d2.engine.export.describe import describe
from iou_d2.engine.export.files import InputSpec, write
from iou_d2.engine.export.quantize import quantize
from iou_d2.engine.memory import keep_freed_memory
from iou_d2.errors import InputError
from iou_d2.runtime import Detector

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from quantize import inputs_of

try:
    import openvino
except ModuleNotFoundError:
    openvino = None

RANDOM = ("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu")
OWN_DATA = ("DATASETS.TRAIN", "('coco_2017_train',)", "MODEL.RETINANET.NUM_CLASSES", "80")
CONFIGS = {
    "VFNet-R50": ("configs/vfnet_R_50_FPN_1x.yaml", ()),
    "VFNet-MobileNetV2": ("configs/quick/vfnet_own_data.yaml", OWN_DATA),
    "IoU-Net-R50": ("configs/iou_net_R_50_FPN_1x.yaml", ()),
    "IoU-Net-MobileNetV2": ("configs/quick/iou_net_own_data.yaml", OWN_DATA),
}
OPENVINO_TYPES = {"OpenVINO": "f32", "OpenVINO bfloat16": "bf16"}
# An image (1, 3, H, W) uint8 -> the outputs of a graph, in their order.
Run = Callable[[Tensor], list[np.ndarray]]


class Trained(NamedTuple):
    """A model in test mode with its config."""

    cfg: CfgNode
    model: nn.Module

    def write(self, path: Path, format: str = "onnx", spec: InputSpec | None = None) -> list[str]:
        """A file with detections; returns the names of its outputs."""
        graph = build_graph(self.cfg, self.model)
        description = describe(self.cfg, self.model, "detections")
        write(format, graph, path, spec or InputSpec(), description)
        return graph.names


def random_model(config_file: str, overrides: tuple[str, ...]) -> Trained:
    cfg = get_config(config_file, [*RANDOM, *overrides])
    torch.manual_seed(0)
    return Trained(cfg, build_model(cfg).eval())


def trained_model(config_file: str, weights: str) -> Trained:
    cfg = get_config(config_file, ["MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu"])
    return Trained(cfg, load_trained(cfg))


def calibration(path: Path, args: argparse.Namespace) -> Iterator[np.ndarray]:
    """Inputs of the file `path`: of the pictures in --calibrate, or noise."""
    if args.calibrate:
        yield from inputs_of(path, [args.calibrate], args.images)
        return
    size = Detector(path).size or (480, 640)
    yield np.random.default_rng(0).integers(0, 256, (1, 3, *size), dtype=np.uint8)


def session(path: Path, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    loaded = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: loaded.run(None, {"images": image.numpy()})


def compiled(path: Path, threads: int, kind: str) -> Run:
    hints = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": kind,
    }
    model = openvino.Core().compile_model(str(path), "CPU", hints)
    return lambda image: list(model(image.numpy()).values())


def eager(model: nn.Module) -> Run:
    def run(image: Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            (found,) = model([{"image": image[0]}])
        return [np.array([len(found["instances"])])]

    return run


def scripted(path: Path) -> Run:
    module = torch.jit.load(path)

    def run(image: Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(image)]

    return run


def runs_of(
    trained: Trained, size: tuple[int, int], folder: Path, args: argparse.Namespace
) -> dict[str, Run]:
    """What takes turns; each of its last outputs is the number of detections. Raises InputError
    where the model cannot be exported."""
    spec = InputSpec(size=size, batch=1)
    script, file, small = folder / "model.pt", folder / "model.onnx", folder / "int8.onnx"
    trained.write(file, "onnx", spec)
    trained.write(script, "torchscript", spec)
    quantize(file, small, calibration(file, args))
    threads = args.threads
    as_run = as_configured(copy.deepcopy(trained.model), trained.cfg)
    runs = {"PyTorch eager": eager(as_run), "TorchScript": scripted(script)}
    runs["ONNX Runtime"] = session(file, threads)
    runs["ONNX Runtime int8"] = session(small, threads)
    return {**runs, **openvino_runs(file, small, threads)}


def openvino_runs(file: Path, small: Path, threads: int) -> dict[str, Run]:
    """None where it is not installed or does not read the file."""
    if openvino is None:
        return {}
    try:
        runs = {name: compiled(file, threads, kind) for name, kind in OPENVINO_TYPES.items()}
        return {**runs, "OpenVINO int8": compiled(small, threads, "f32")}
    except RuntimeError as error:
        reason = next(line for line in reversed(str(error).splitlines()) if line.strip())
        print(f"OpenVINO has no row, for it does not read the file: {reason}")
        return {}


def table(runs: dict[str, Run], image: Tensor, rounds: int) -> str:
    counts = {name: int(run(image)[-1][0]) for name, run in runs.items()}
    times = in_turn({name: lambda run=run: run(image) for name, run in runs.items()}, rounds)
    first, rows = next(iter(times.values())), []
    for name, values in times.items():
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        ratio = statistics.median(a / b for a, b in zip(values, first))
        spread = f"{low:.3f} to {high:.3f}"
        rows.append([name, f"{middle:.3f}", spread, f"{ratio:.2f}", counts[name]])
    headers = ["", "median (s)", "quartiles (s)", "ratio", "detections"]
    return tabulate(rows, headers, "pipe", disable_numparse=True)


def accuracy(trained: Trained, args: argparse.Namespace, folder: Path) -> str:
    """AP of the files in float32 and in 8 bits, of images of any size."""
    files = {"float32": folder / "any.onnx", "int8": folder / "any_int8.onnx"}
    trained.write(files["float32"])
    quantize(files["float32"], files["int8"], calibration(files["float32"], args))
    rows = []
    for name, file in files.items():
        output = folder / name
        evaluate(["--model", str(file), "--test", args.test, "OUTPUT_DIR", str(output)])
        results = json.loads((output / "evaluation.json").read_text())["results"]
        megabytes = file.stat().st_size / 2**20
        row = [results[f"bbox/{metric}"] for metric in ("AP", "AP50", "AP75")]
        rows.append([name, *(f"{value:.2f}" for value in row), f"{megabytes:.1f}"])
    headers = [args.test, "AP", "AP50", "AP75", "file (MB)"]
    return tabulate(rows, headers, "pipe", disable_numparse=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", nargs="*", default=["480x640", "800x1333"], metavar="HxW")
    add("--rounds", type=int, default=7)
    add("--models", nargs="*", choices=CONFIGS, default=list(CONFIGS))
    add("--threads", type=int, default=2)
    add("--config", default="", help="of the --weights, in the place of --models")
    add("--weights", default="", metavar="FILE")
    add("--calibrate", default="", metavar="FOLDER", help="pictures for the ranges of 8 bits")
    add("--images", type=int, default=64, metavar="N", help="of them so many, 64 by default")
    add("--test", default="", metavar="NAME", help="data to evaluate the files on")
    add("--keep", default="", metavar="FOLDER", help="where the files stay; nowhere by default")
    return parser


def measure(name: str, trained: Trained, args: argparse.Namespace, folder: Path) -> None:
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    for size in args.size:
        height, width = map(int, size.split("x"))
        print(f"{name}, {size}", flush=True)
        try:
            runs = runs_of(trained, (height, width), folder, args)
        except InputError as error:
            print(f"There is no row: {error}\n")
            return
        image = torch.from_numpy(next(calibration(folder / "model.onnx", args)))
        print(table(runs, image, args.rounds) + "\n", flush=True)
    if args.test:
        print(accuracy(trained, args, folder))


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if bool(args.config) != bool(args.weights) or (args.test and not args.calibrate):
        parser.error("--config and --weights belong together, and --test needs --calibrate")
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the commands do
    versions = f"ONNX Runtime {onnxruntime.__version__}"
    if openvino is not None:
        versions += f", OpenVINO {openvino.__version__}"
    print(f"{machine()}, {versions}, 1 image, median of {args.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        if args.weights:
            measure("trained", trained_model(args.config, args.weights), args, folder)
            return
        for name in args.models:
            measure(name, random_model(*CONFIGS[name]), args, folder)


if __name__ == "__main__":
    main()
