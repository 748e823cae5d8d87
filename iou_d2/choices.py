"""What arguments of commands may be, for the parsers, which load no torch, and for what does the
work."""

from __future__ import annotations

# Of `iou-d2 convert`. "adelaidet" is that of aim-uofa/AdelaiDet, "detectron2_main" that of the FCOS
# which only the main branch of Detectron2 has. "amdegroot" is amdegroot/ssd.pytorch, "lufficc" is
# lufficc/SSD, "luuuyi" is luuuyi/RefineDet.PyTorch.
LAYOUTS = (
    "mmdet",
    "torchvision",
    "detectron2",
    "adelaidet",
    "detectron2_main",
    "amdegroot",
    "lufficc",
    "luuuyi",
)

# Of `iou-d2 export`: what kind of file, what it puts out, and the opsets of ONNX.
FORMATS = ("onnx", "torchscript", "pt2")
OUTPUTS = ("raw", "candidates", "detections", "refinement")
OPSETS = range(17, 23)
