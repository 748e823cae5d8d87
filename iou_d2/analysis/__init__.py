"""What result files say about localisation: records -> curves (pure) -> plots.

Works on a ground-truth JSON and a results JSON; knows no method and no config. What draws is in
`plots`, which loads Matplotlib, and trainings have no need of it.
"""

from .comparison import metric_by_iteration, recall_by_false_positives
from .curves import binned_mean, correlation, localization_table, select_localized
from .reading import read_ground_truth, read_results
from .records import Records, best_iou, make_records, read_records

__all__ = [
    "Records",
    "best_iou",
    "binned_mean",
    "correlation",
    "localization_table",
    "make_records",
    "metric_by_iteration",
    "read_ground_truth",
    "read_records",
    "read_results",
    "recall_by_false_positives",
    "select_localized",
]
