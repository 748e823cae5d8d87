"""RefineDet320 and RefineDet512 on VGG-16, of luuuyi/RefineDet.PyTorch.

Its order of boxes in a cell is that of the configs here, and its classes are those of VOC in the
order of the alphabet, as Detectron2 has them. Its anchors are no longer than the image, which is
MODEL.ANCHOR_GENERATOR.NAME "ClippedAnchorGenerator" here; the authors' code does not clip.
"""

from __future__ import annotations

from .network import Network
from .rows import Row
from .ssd import CAFFE_PIXELS, extra_rows, head_rows, vgg_rows

LEVELS = range(4)


def luuuyi_rows() -> list[Row]:
    return [
        *vgg_rows("vgg"),
        *extra_rows("extras"),
        Row("conv4_3_L2Norm.weight", "backbone.norms.conv4_3.weight"),
        Row("conv5_3_L2Norm.weight", "backbone.norms.conv5_3.weight"),
        *_transfer_rows(),
        *head_rows("arm_loc", "arm_conf", "head.arm_bbox", "head.arm_score"),
        *head_rows("odm_loc", "odm_conf", "head.odm_bbox", "head.odm_score"),
    ]


def _transfer_rows() -> list[Row]:
    rows = []
    for level in LEVELS:
        # A level has three layers in tcb0 and in tcb2, and not all of them have weights.
        first, ours = 3 * level, f"head.transfer.{level}"
        rows += [
            Row(f"tcb0.{first}.*", f"{ours}.conv1.*"),
            Row(f"tcb0.{first + 2}.*", f"{ours}.conv2.*"),
            Row(f"tcb1.{level}.*", f"{ours}.up.*"),
            Row(f"tcb2.{first + 1}.*", f"{ours}.conv3.*"),
        ]
    return rows


REFINEDET = Network(
    title="RefineDet",
    signs={"luuuyi": r"^tcb0\.", "detectron2": r"^head\.transfer\.\d"},
    rows={"luuuyi": luuuyi_rows},
    pixels={"luuuyi": CAFFE_PIXELS},
    settings={"luuuyi": {"MODEL.ANCHOR_GENERATOR.NAME": "ClippedAnchorGenerator"}},
)
