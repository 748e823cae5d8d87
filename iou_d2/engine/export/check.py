"""Running an exported file, and comparing it with its model."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from .agreement import Agreement, agreement, detections_of_outputs
from .files import InputSpec, program_example
from .graph import ImageGraph

# Images (N, 3, H, W), and what else it takes, -> the outputs of a file, in their order.
Run = Callable[..., list[np.ndarray]]


def load(path: str | os.PathLike, format: str) -> Run:
    """What runs a file of one of FORMATS on the CPU. Raises ImportError without its package."""
    path = os.fspath(path)
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [x.name for x in session.get_inputs()]
        return lambda *inputs: session.run(None, dict(zip(names, (x.numpy() for x in inputs))))
    if format == "torchscript":
        module = torch.jit.load(path)
    else:
        module = torch.export.load(path).module()
    return lambda *inputs: [output.detach().numpy() for output in module(*inputs)]


def compare(run: Run, graph: ImageGraph, images: Tensor, cfg: CfgNode) -> Agreement:
    """How a file with detections agrees with the detector of `graph`, the model of `cfg`, which
    knows nothing of graphs, about images and what else `graph` takes with them."""
    inputs = graph.inputs_with(images)
    return agreement(
        graph.expected(*inputs),
        detections_of_outputs(graph.names, run(*inputs)),
        cfg.TEST.DETECTIONS_PER_IMAGE,
        graph.score_threshold,
    )


def check_file(
    path: str | os.PathLike, format: str, graph: ImageGraph, spec: InputSpec, cfg: CfgNode
) -> str:
    """Run a file that was just written on random images, and print how it agrees with its model.

    Returns a sentence where it does not, or else "".
    """
    try:
        run = load(path, format)
    except ImportError as error:
        print(f"It was not run: {error}.")
        return ""
    is_program = format == "pt2"
    images = program_example(graph, spec) if is_program else spec.example(graph.divisor)
    if graph.outputs in ("raw", "candidates"):
        outputs = run(*graph.inputs_with(images))
        shapes = (f"{name} {x.shape}" for name, x in zip(graph.names, outputs))
        print(f"It runs: {', '.join(shapes)}.")
        return ""
    found = compare(run, graph, images, cfg)
    text = f"{found.pairs} detections in {len(images)} random images: {found}"
    if found.holds(graph.doubtful):
        print(f"It and the model agree about {text}.")
        return ""
    return f"{path} and its model do not agree about {text}."
