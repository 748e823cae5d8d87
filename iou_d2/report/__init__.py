"""One page that shows what a detector does, from result files: subjects -> measures -> page, or a
dataset of FiftyOne.

Needs neither torch nor Detectron2. What counts is in iou_d2/analysis; here it is laid out.
"""

from .fiftyone_dataset import check_dataset, write_dataset
from .measures import measure
from .page import LARGEST_PAGE, write_page
from .subject import Curve, Expected, Subject

__all__ = [
    "LARGEST_PAGE",
    "Curve",
    "Expected",
    "Subject",
    "check_dataset",
    "measure",
    "write_dataset",
    "write_page",
]
