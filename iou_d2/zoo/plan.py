"""The plan: tables, their rows, and the runs that make them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from iou_d2.errors import InputError, MissingFileError

# Stands in the plan, in records and on pages for the folder of the users' data.
DATA = "DATA"


@dataclass(frozen=True)
class Dataset:
    """What a set of a plan is trained and tested on; None for the datasets of the config."""

    train: str | None = None
    test: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        name: in the table.
        config: name of a config that comes with iou_d2.
        overrides: KEY VALUE pairs that make this row.
    """

    name: str
    config: str
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training: row `row` of table `table` on one set with one seed."""

    table: str
    dataset: str
    row: str
    seed: int
    config: str
    overrides: Mapping[str, str]
    train: str | None
    test: str | None

    @property
    def name(self) -> str:
        return f"{self.table}/{self.dataset}/{self.row}-seed{self.seed}"

    @property
    def training(self) -> tuple:
        """What the results depend on: equal for runs of several tables that train the same."""
        overrides = frozenset(self.overrides.items())
        return self.config, overrides, self.train, self.test, self.seed

    def arguments(
        self, data: str = DATA, output: str | None = None, num_gpus: int = 0
    ) -> list[str]:
        """What `iou-d2` is given for this run.

        Args:
            data: folder of the sets.
            output: OUTPUT_DIR; None leaves it out.
            num_gpus: 0 is the CPU.
        """
        words = ["train", "--num-gpus", str(num_gpus), "--config", self.config]
        for option, value in (("--train", self.train), ("--test", self.test)):
            words += [option, value.replace(DATA, data)] if value else []
        words += ["OUTPUT_DIR", output] if output else []
        for key, value in (("SEED", str(self.seed)), *self.overrides.items()):
            words += [key, value]
        return words


@dataclass(frozen=True)
class Table:
    title: str
    sets: Sequence[str]
    seeds: Sequence[int]
    rows: Mapping[str, Row]
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        path: of the plan; records lie beside it.
        records: folder in which new records are kept, and where they are looked for first.
    """

    path: Path
    records: Path
    sets: Mapping[str, Dataset]
    tables: Mapping[str, Table]

    @cached_property
    def trainings(self) -> dict[tuple, list[Run]]:
        """The runs of each `Run.training`, in the order of `runs`."""
        trainings = {}
        for run in self.runs():
            trainings.setdefault(run.training, []).append(run)
        return trainings

    def runs(self) -> Iterator[Run]:
        """All runs, by table, seed, set and row: first one seed of everything."""
        for name, table in self.tables.items():
            for seed in table.seeds:
                for dataset in table.sets:
                    for row in table.rows:
                        yield self.run(name, dataset, row, seed)

    def run(self, table: str, dataset: str, row: str, seed: int) -> Run:
        """Later overrides win: of the set, of the table, of the row."""
        chosen, part = self.tables[table].rows[row], self.sets[dataset]
        overrides = {**part.overrides, **self.tables[table].overrides, **chosen.overrides}
        return Run(
            table, dataset, row, seed, chosen.config, overrides, part.train, part.test
        )  # fmt: skip


def read_plan(path: Path, records: Path | None = None) -> Plan:
    """
    Args:
        records: the plan's `records`; None for the folder of the plan.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is no plan; says where.
    """
    if not path.is_file():
        raise MissingFileError(f"There is no plan {path}; --plan names another one.")
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        sets = {name: Dataset(**(part or {})) for name, part in plan["sets"].items()}
        tables = {name: _table(part) for name, part in plan["tables"].items()}
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no plan of runs: {error!r}.") from error
    for name, table in tables.items():
        unknown = [dataset for dataset in table.sets if dataset not in sets]
        if unknown:
            raise InputError(f"{path}: table {name} is on {unknown[0]}, which is none of the sets.")
    return Plan(path, records or path.parent, sets, tables)


def _table(part: dict[str, Any]) -> Table:
    rows = {name: Row(**row) for name, row in part["rows"].items()}
    return Table(**{**part, "rows": rows})
