"""Graphs as files: ONNX, TorchScript and the archive of torch.export.

Shape letters: N images, H and W of them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from iou_d2.choices import OPSETS
from iou_d2.errors import InputError
from iou_d2.runtime.description import Description

from .deform import DEFORM_CONV_OPSET, SampledDeformConv, deform_conv_symbolic
from .graph import ImageGraph

# What the exporter that works on TorchScript writes at most; above it the file is converted.
TRACED_OPSETS = range(17, 21)
# The file that says in a TorchScript file or an archive what metadata say in ONNX.
DESCRIPTION_FILE = "iou_d2.json"


@dataclass(frozen=True)
class InputSpec:
    """What images a graph takes.

    Args:
        size: (height, width), or None for any.
        batch: number of images, or None for any.
        dtype: torch.uint8 or torch.float32; the values are 0..255 in both.
    """

    size: tuple[int, int] | None = None
    batch: int | None = None
    dtype: torch.dtype = torch.uint8

    def example(self, divisor: int) -> Tensor:
        """Random images. Where any are taken their number is 2, for exporters make a constant of 1,
        and no side is a multiple of `divisor`, so that the padding is part of the graph. Nor are
        they so short that coarse maps have a single cell."""
        unit = max(divisor, 32)
        height, width = self.size or (4 * unit + 1, 5 * unit + 3)
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch or 2, 3, height, width)
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(self.dtype)


def write_onnx(
    graph: ImageGraph,
    path: str | os.PathLike,
    spec: InputSpec,
    description: Description,
    opset: int,
    deform_conv: str = "GridSample",
) -> None:
    """
    Args:
        opset: one of OPSETS.
        deform_conv: what deformable convolutions become: "GridSample", or "DeformConv" from opset
            19 on.

    Raises:
        InputError: there is no package onnx, or no such opset or none of it in ONNX Runtime.
    """
    onnx = require_onnx()
    if opset not in OPSETS:
        raise InputError(f"--opset is {OPSETS[0]} to {OPSETS[-1]}, but it is {opset}.")
    if opset > graph.last_opset:
        raise InputError(
            f"ONNX Runtime has no RoiAlign of opset {opset}: --opset is {OPSETS[0]} to "
            f"{graph.last_opset} for this detector."
        )
    if deform_conv == "DeformConv" and opset < DEFORM_CONV_OPSET:
        raise InputError(
            f"ONNX has DeformConv from opset {DEFORM_CONV_OPSET} on, but --opset is {opset}."
        )
    traced = min(opset, TRACED_OPSETS[-1])
    example = graph.inputs_with(spec.example(graph.divisor))
    sampling = SampledDeformConv() if deform_conv == "GridSample" else _deform_conv_operator()
    with _whole(path) as unfinished, sampling, _quiet():
        torch.onnx.export(
            graph,
            example,
            unfinished,
            input_names=list(graph.input_names),
            output_names=graph.names,
            dynamic_axes=_dynamic_axes(graph, spec),
            opset_version=traced,
            dynamo=False,
        )
        model = onnx.load(unfinished)
        if opset > traced:
            model = onnx.version_converter.convert_version(model, opset)
        model.producer_name = "iou_d2"
        model.producer_version = description.version
        onnx.helper.set_model_props(model, description.to_metadata())
        onnx.checker.check_model(model)
        onnx.save(model, unfinished)


def write_torchscript(
    graph: ImageGraph, path: str | os.PathLike, spec: InputSpec, description: Description
) -> None:
    """`graph` as a file for `torch.jit.load`."""
    graph = copy.deepcopy(graph).requires_grad_(False)  # what `no_grad` does is not traced
    with _whole(path) as unfinished, _quiet():
        example = graph.inputs_with(spec.example(graph.divisor))
        traced = torch.jit.trace(graph, example, check_trace=False)
        torch.jit.save(traced, unfinished, _extra_files=_described(graph, description))


def program_example(graph: ImageGraph, spec: InputSpec) -> Tensor:
    """Random images of a size that `write_program` allows."""
    size = spec.size or (2 * graph.coarsest, 3 * graph.coarsest)
    return replace(spec, size=size).example(graph.divisor)


def write_program(
    graph: ImageGraph, path: str | os.PathLike, spec: InputSpec, description: Description
) -> None:
    """`graph` as a file for `torch.export.load`.

    Where it takes any size, that has to be a multiple of `graph.coarsest`: padding, and features
    of odd sizes, and of many detectors a single row, are more than torch.export can reason about.

    Raises:
        InputError: a graph that torch.export cannot follow.
    """
    if not graph.exports_program:
        raise InputError(
            "torch.export does not follow the loops of precise RoI pooling, "
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE or MODEL.ROI_MASK_HEAD.POOLER_TYPE 'PrRoIPool': "
            "--format is onnx or torchscript for it."
        )
    example = program_example(graph, spec)
    if spec.size is None:
        graph = copy.copy(graph)
        graph.pads = False
    shapes = {}
    if spec.batch is None:
        shapes[0] = torch.export.Dim("batch", min=1, max=1024)
    if spec.size is None:
        for axis, name in ((2, "rows"), (3, "columns")):
            shapes[axis] = graph.coarsest * torch.export.Dim(name, min=1, max=1024)
    with _whole(path) as unfinished, _quiet():
        program = torch.export.export(graph, (example,), dynamic_shapes=(shapes,), strict=False)
        torch.export.save(program, unfinished, extra_files=_described(graph, description))


def write(
    format: str,
    graph: ImageGraph,
    path: str | os.PathLike,
    spec: InputSpec,
    description: Description,
    opset: int = OPSETS[0],
    deform_conv: str = "GridSample",
) -> None:
    """Write `graph` in one of FORMATS, whole or not at all; the last two are for ONNX."""
    # The exporter of ONNX gives all parts the training flag of the graph.
    graph.eval()(*graph.inputs_with(spec.example(graph.divisor)))  # which makes its names
    if format == "onnx":
        write_onnx(graph, path, spec, description, opset, deform_conv)
    else:
        {"torchscript": write_torchscript, "pt2": write_program}[format](
            graph, path, spec, description
        )


def _described(graph: ImageGraph, description: Description) -> dict[str, str]:
    content = {**description.to_metadata(), "outputs": graph.names}
    return {DESCRIPTION_FILE: json.dumps(content, indent=1)}


def _dynamic_axes(graph: ImageGraph, spec: InputSpec) -> dict[str, dict[int, str]]:
    axes = {name: {} for name in (*graph.input_names, *graph.names)}
    if spec.batch is None:
        for name in axes:
            axes[name][0] = "batch"
    if spec.size is None:
        axes["images"].update({2: "height", 3: "width"})
    for name in graph.input_names[1:]:
        axes[name][1] = "candidates"
    return axes


def require_onnx():
    """The package onnx. Raises InputError where it is not installed."""
    try:
        import onnx
        import onnx.version_converter
    except ModuleNotFoundError as error:
        raise InputError(
            "Files in ONNX are written with the package onnx, which is not installed: run "
            '`pip install "iou_d2[export]"`.'
        ) from error
    return onnx


@contextlib.contextmanager
def _deform_conv_operator() -> Iterator[None]:
    """Within it the exporter knows torchvision's deformable convolution."""
    name = "torchvision::deform_conv2d"
    torch.onnx.register_custom_op_symbolic(name, deform_conv_symbolic, DEFORM_CONV_OPSET)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic(name, DEFORM_CONV_OPSET)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of constants that are ones, such as strides, and of their own age."""
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)


@contextlib.contextmanager
def _whole(path: str | os.PathLike) -> Iterator[str]:
    """A path beside `path`, which takes its name when all is written."""
    path = Path(path)
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.unfinished{path.suffix}")
    try:
        yield str(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
