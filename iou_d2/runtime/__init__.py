"""Detectors in ONNX files, with NumPy, OpenCV and ONNX Runtime alone: no torch, no Detectron2.

detections = Detector("model.onnx")(cv2.imread("image.jpg"))
"""

from .description import Description, ShortestEdge, Square
from .detector import Detector
from .masks import paste_masks
from .refiner import Refiner

__all__ = ["Description", "Detector", "Refiner", "ShortestEdge", "Square", "paste_masks"]
