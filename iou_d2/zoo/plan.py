"""The plan: tables, their rows, and the runs that make them.

A row is trained from the weights of its config, or goes on from another row of its table: it is
trained from that row's model, or is an evaluation of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from iou_d2.errors import InputError, MissingFileError

# Stand in the plan, in records and on pages for the folder of the users' data, and for that of the
# run that another one goes on from.
DATA, BASE = "DATA", "BASE"
# Of the folder that a training leaves.
MODEL = "model_final.pth"


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
        config: name of a config that comes with iou_d2; None for an evaluation.
        overrides: KEY VALUE pairs that make this row.
        starts_from: an earlier row, whose model this one is trained from.
        evaluates: an earlier row, whose model is evaluated with these overrides.
        baseline: a row that this one is held against, in place of the table's.
    """

    name: str
    config: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    starts_from: str | None = None
    evaluates: str | None = None
    baseline: str | None = None

    @property
    def base(self) -> str | None:
        """The row that this one goes on from."""
        return self.starts_from or self.evaluates


@dataclass(frozen=True)
class Run:
    """One training: row `row` of table `table` on one set with one seed; or an evaluation, whose
    `config`, `train` and `test` are in the folder of the run that it is of.

    Attributes:
        base: the run that this one goes on from.
    """

    table: str
    dataset: str
    row: str
    seed: int
    config: str | None
    overrides: Mapping[str, str]
    train: str | None
    test: str | None
    base: Run | None = None

    @property
    def name(self) -> str:
        return f"{self.table}/{self.dataset}/{self.row}-seed{self.seed}"

    @property
    def is_evaluation(self) -> bool:
        return self.config is None

    @property
    def depth(self) -> int:
        """How many runs come before this one."""
        return 0 if self.base is None else self.base.depth + 1

    @property
    def training(self) -> tuple:
        """What the results depend on: equal for runs of several tables that train the same."""
        overrides = frozenset(self.overrides.items())
        before = None if self.base is None else self.base.training
        return self.config, overrides, self.train, self.test, self.seed, before

    @property
    def settings(self) -> dict:
        """What a record says of the plan, to be held against it."""
        own = {"config": self.config, "seed": self.seed, "overrides": dict(self.overrides)}
        return own if self.base is None else {**own, "base": self.base.settings}

    def arguments(
        self, data: str = DATA, output: str | None = None, num_gpus: int = 0, base: str = BASE
    ) -> list[str]:
        """What `iou-d2` is given for this run.

        Args:
            data: folder of the sets.
            output: OUTPUT_DIR; None leaves it out.
            num_gpus: 0 is the CPU.
            base: OUTPUT_DIR of the run that this one goes on from.
        """
        config = f"{base}/config.yaml" if self.is_evaluation else self.config
        words = ["eval" if self.is_evaluation else "train"]
        words += ["--num-gpus", str(num_gpus), "--config", config]
        for option, value in (("--train", self.train), ("--test", self.test)):
            words += [option, value.replace(DATA, data)] if value else []
        words += ["OUTPUT_DIR", output] if output else []
        words += [] if self.base is None else ["MODEL.WEIGHTS", f"{base}/{MODEL}"]
        words += [] if self.is_evaluation else ["SEED", str(self.seed)]
        for key, value in self.overrides.items():
            words += [key, value]
        return words


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        metrics: of boxes, the columns of the table on pages.
        baseline: the row that the others are held against: a column has the gain in AP over it,
            seed by seed, and one how much that hangs on the test images.
    """

    title: str
    sets: Sequence[str]
    seeds: Sequence[int]
    rows: Mapping[str, Row]
    overrides: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[str] = ("AP", "AP50", "AP75", "AP90")
    baseline: str | None = None

    def baseline_of(self, row: str) -> str | None:
        """What a row is held against; None for the baseline itself, and where there is none."""
        baseline = self.rows[row].baseline or self.baseline
        return None if baseline == row else baseline


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

    def alike(self, run: Run) -> list[str]:
        """Names of the runs whose record or model may stand for this one's: its own, then those of
        runs that train the same. Of a run that others go on from only its own, for these are to be
        compared with the very model, and no two machines train the same one."""
        if run.name in self._bases:
            return [run.name]
        return [run.name, *(other.name for other in self.trainings[run.training])]

    @cached_property
    def _bases(self) -> frozenset[str]:
        return frozenset(run.base.name for run in self.runs() if run.base is not None)

    def runs(self) -> Iterator[Run]:
        """All runs, by table, seed, set and row: first one seed of everything."""
        for name, table in self.tables.items():
            for seed in table.seeds:
                for dataset in table.sets:
                    for row in table.rows:
                        yield self.run(name, dataset, row, seed)

    def run(self, table: str, dataset: str, row: str, seed: int) -> Run:
        """Later overrides win: of the set, of the table, of the row. An evaluation has those of its
        row alone, for the others are in the config of what it evaluates."""
        chosen, part = self.tables[table].rows[row], self.sets[dataset]
        base = None if chosen.base is None else self.run(table, dataset, chosen.base, seed)
        if chosen.evaluates:
            return Run(table, dataset, row, seed, None, chosen.overrides, None, None, base)
        overrides = {**part.overrides, **self.tables[table].overrides, **chosen.overrides}
        return Run(
            table, dataset, row, seed, chosen.config, overrides, part.train, part.test, base
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
        _check_rows(f"{path}: table {name}", table)
    return Plan(path, records or path.parent, sets, tables)


def _table(part: dict[str, Any]) -> Table:
    rows = {name: Row(**row) for name, row in part["rows"].items()}
    return Table(**{**part, "rows": rows})


def _check_rows(where: str, table: Table) -> None:
    if table.baseline is not None and table.baseline not in table.rows:
        raise InputError(f"{where} has no row {table.baseline}, its baseline.")
    earlier: set[str] = set()
    for name, row in table.rows.items():
        is_one = (row.config is None) == (row.evaluates is not None)
        if not is_one or (row.starts_from and row.evaluates):
            raise InputError(
                f"{where}, row {name}: a row has a `config`, from which it is trained, or says by "
                "`evaluates` which row it evaluates."
            )
        if row.baseline is not None and row.baseline not in table.rows:
            raise InputError(f"{where}, row {name} is held against {row.baseline}, no row of it.")
        if row.base is not None and row.base not in earlier:
            raise InputError(f"{where}, row {name} goes on from {row.base}, no row before it.")
        earlier.add(name)
