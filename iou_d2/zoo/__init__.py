"""The runs behind the tables of the documents: which there are, their records, the tables.

A plan names tables of runs; each run's record, a small JSON, is kept beside the plan, and with it
how a row compares with its baseline over the test images; pages hold the tables between two marks.
Nothing here trains: see iou_d2/commands/zoo.py.
"""

from .pages import model_zoo, with_tables
from .paired import Comparison, comparisons, keep_test, kept_test
from .plan import Plan, Row, Run, Table, read_plan
from .records import agrees, keep, kept, path_of, recorded_in, trained_in

__all__ = [
    "Comparison",
    "Plan",
    "Row",
    "Run",
    "Table",
    "agrees",
    "comparisons",
    "keep",
    "keep_test",
    "kept",
    "kept_test",
    "model_zoo",
    "path_of",
    "read_plan",
    "recorded_in",
    "trained_in",
    "with_tables",
]
