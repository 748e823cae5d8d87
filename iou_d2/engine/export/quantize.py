"""ONNX files of `iou-d2 export` with convolutions in 8 bits, whose ranges come from pictures.

The file that is written holds pairs of QuantizeLinear and DequantizeLinear, which ONNX Runtime and
OpenVINO both turn into integer kernels. Weights are int8 with a scale for each channel, activations
uint8. A range is the mean over the pictures of the lowest and the highest value, so that what
happens in a single one is cut off.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from iou_d2.errors import InputError
from iou_d2.runtime.description import PREFIX

from .files import require_onnx

# In the backbone integers pass through these too. Elsewhere, as in what decodes boxes, they are
# arithmetic of coordinates and stay as they are.
BACKBONE, BETWEEN = "/backbone/", {"Add", "Clip", "MaxPool", "Relu", "Resize"}
# The fully connected layers of two-stage detectors. Those of the IoU branch stay, whose gradient is
# in the graph too.
BOX_HEAD = re.compile(r"/box_head[./]")
# Layers that predict classes, boxes or offsets, by the names of their modules: 8 bits are too few
# for what they say.
PREDICTS = re.compile(r"pred|score|logits|deltas|offset|arm_bbox|odm_bbox")


def quantize(
    path: str | os.PathLike, output: str | os.PathLike, inputs: Iterable[np.ndarray]
) -> int:
    """
    Args:
        path: of a file in float32; where it is written to.
        inputs: what the model takes, (N, 3, H, W), of pictures such as those it will see: at least
            one, and some dozens for ranges that hold.

    Returns:
        how many convolutions are in 8 bits.

    Raises:
        InputError: `path` is no file of `iou-d2 export`, or there is no input.
    """
    onnx = require_onnx()
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder:
        simple = str(Path(folder) / "simple.onnx")
        metadata = {x.key: x.value for x in onnx.load(path).metadata_props}
        if PREFIX + "format" not in metadata:
            raise InputError(f"{os.fspath(path)} is no file of `iou-d2 export`.")
        # Which folds norms into convolutions.
        quantization.quant_pre_process(str(path), simple, skip_symbolic_shape=True)
        nodes = nodes_to_quantize(onnx.load(simple))
        quantization.quantize_static(
            simple,
            str(output),
            _Reader(inputs),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=list(nodes),
            op_types_to_quantize=sorted({*nodes.values()}),
            extra_options={"CalibMovingAverage": True, "WeightSymmetric": True},
        )
    model = onnx.load(output)
    _give_types(model, onnx)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, output)
    return sum(kind == "Conv" for kind in nodes.values())


def nodes_to_quantize(model) -> dict[str, str]:
    """Names and kinds of the nodes of an onnx.ModelProto that compute in 8 bits."""
    return {
        node.name: node.op_type
        for node in model.graph.node
        if (node.op_type == "Conv" and not PREDICTS.search(node.name))
        or (node.op_type in BETWEEN and node.name.startswith(BACKBONE))
        or (node.op_type == "Gemm" and BOX_HEAD.match(node.name))
    }


def _give_types(model, onnx) -> None:
    """Casts what loops give, as precise RoI pooling does, to the float32 that it is: OpenVINO knows
    no type of it and then does not read the QuantizeLinear behind."""
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "ConcatFromSequence"]:
        name = node.output[0]
        node.output[0] = f"{name}_untyped"
        cast = onnx.helper.make_node(
            "Cast", [node.output[0]], [name], f"{node.name}_typed", to=onnx.TensorProto.FLOAT
        )
        graph.node.insert(list(graph.node).index(node) + 1, cast)


class _Reader:
    """What ONNX Runtime asks for its inputs one by one."""

    def __init__(self, inputs: Iterable[np.ndarray]):
        self.inputs: Iterator[np.ndarray] = iter(inputs)
        self.count = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self.inputs, None)
        if images is None and not self.count:
            raise InputError("There is no picture from which 8 bits get their ranges.")
        self.count += 1
        return None if images is None else {"images": images}
