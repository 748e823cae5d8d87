"""The runs behind the tables of the documents: which there are, their records, the tables.

A plan names tables of runs; each run's record, a small JSON, is kept beside the plan; pages hold
the tables between two marks. Nothing here trains: see iou_d2/commands/zoo.py.
"""

from .pages import model_zoo, with_tables
from .plan import Plan, Row, Run, Table, read_plan
from .records import agrees, keep, kept, path_of, trained_in

__all__ = [
    "Plan",
    "Row",
    "Run",
    "Table",
    "agrees",
    "keep",
    "kept",
    "model_zoo",
    "path_of",
    "read_plan",
    "trained_in",
    "with_tables",
]
