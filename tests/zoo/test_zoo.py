"""The plan of runs, their records and the pages made of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from iou_d2 import get_config
from iou_d2.commands.parsers.zoo import PAGES
from iou_d2.errors import InputError
from iou_d2.zoo import agrees, keep, kept, model_zoo, path_of, read_plan, with_tables
from zoo_runs import PLAN, finished

ROOT = Path(__file__).parents[2]


def test_the_plan_names_every_row_on_every_set_with_every_seed(plan):
    names = [run.name for run in plan.runs()]
    assert len(names) == len(set(names)) == 2 * 2 * 2
    assert names[:3] == ["losses/cells/plain-seed1", "losses/cells/other-seed1",
                         "losses/shapes/plain-seed1"]  # fmt: skip


def test_overrides_of_a_row_win_over_those_of_its_table(plan):
    run = plan.run("losses", "cells", "other", 2)
    assert run.overrides == {"TEST.DETECTIONS_PER_IMAGE": "7", "SOLVER.MAX_ITER": "4"}
    words = run.arguments("/data", "out")
    assert words[words.index("--train") + 1] == "coco:/data/a.json"
    assert words[words.index("SEED") + 1] == "2"
    assert "--train" not in plan.run("losses", "shapes", "plain", 1).arguments()


def test_a_kept_record_holds_nothing_of_the_machine(plan, tmp_path):
    run = plan.run("losses", "cells", "plain", 1)
    path = keep(plan, run, finished(tmp_path / "out", run))
    assert path == path_of(plan, run)
    assert "somewhere" not in path.read_text()
    record = kept(plan, run)
    assert record["results"]["localization/pearson_confidence"] == 0.5123
    assert record["overrides"] == dict(run.overrides)


def test_a_resumed_run_took_the_time_of_all_its_parts(plan, tmp_path):
    run = plan.run("losses", "cells", "plain", 1)
    earlier = [{"seconds": 10.0}, {"seconds": None}]
    keep(plan, run, finished(tmp_path / "out", run, earlier=earlier))
    assert kept(plan, run)["seconds"] == 100.0


@pytest.mark.parametrize(
    "changes",
    [
        {"config": "quick/atss_shapes"},
        {"seed": 3},
        {"overrides": ["SOLVER.MAX_ITER", "5"]},
        {"outcome": "KeyboardInterrupt: ", "results": None},
    ],
)
def test_a_run_of_other_settings_is_not_kept(plan, tmp_path, changes):
    run = plan.run("losses", "cells", "plain", 1)
    with pytest.raises(InputError):
        keep(plan, run, finished(tmp_path / "out", run, **changes))
    assert kept(plan, run) is None


UNFINISHED = {"outcome": None, "results": None, "seconds": None}
DAMAGED = {
    "cut": '{"outcome": "fini',
    "empty": "",
    "nothing": "{}",
    "a list": "[]",
    "text": '{"results": "x"}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_of_a_run_is_named_and_agrees_with_nothing(plan, tmp_path, text):
    run = plan.run("losses", "cells", "plain", 1)
    folder = finished(tmp_path / "out", run)
    keep(plan, run, folder)
    assert agrees(plan, run, folder)
    (folder / "run.json").write_text(text)
    assert not agrees(plan, run, folder)
    with pytest.raises(InputError, match=r"run\.json"):
        keep(plan, run, folder)


@pytest.mark.parametrize(
    "changes", [{"results": ["x"]}, {"results": {"bbox/AP": "x"}}, {"overrides": 3}]
)
def test_a_run_whose_values_are_odd_is_not_kept(plan, tmp_path, changes):
    run = plan.run("losses", "cells", "plain", 1)
    with pytest.raises(InputError, match=r"run\.json is no record of a run, or a damaged one"):
        keep(plan, run, finished(tmp_path / "out", run, **changes))


def test_an_unfinished_run_agrees_with_no_record(plan, tmp_path):
    run = plan.run("losses", "cells", "plain", 1)
    keep(plan, run, finished(tmp_path / "out", run))
    assert not agrees(plan, run, finished(tmp_path / "out", run, **UNFINISHED))


def test_a_record_that_the_plan_has_left_behind_is_told(plan, tmp_path):
    run = plan.run("losses", "cells", "plain", 1)
    keep(plan, run, finished(tmp_path / "out", run))
    plan.path.write_text(PLAN.replace('"3"', '"30"'))
    with pytest.raises(InputError, match="train anew"):
        kept(read_plan(plan.path), run=read_plan(plan.path).run("losses", "cells", "plain", 1))


def test_tables_show_mean_and_deviation_over_seeds(plan, tmp_path):
    for seed, ap in ((1, 40.0), (2, 42.0)):
        run = plan.run("losses", "cells", "plain", seed)
        keep(plan, run, finished(tmp_path / str(seed), run, ap))
    page = "before\n<!-- runs: losses -->\nold\n<!-- end of runs -->\nafter\n"
    written = with_tables(page, plan)
    row = next(line for line in written.splitlines() if line.startswith("| Plain"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Standard deviation of 40 and 42: sqrt(2).
    assert cells == ["Plain", "41.0 ± 1.4", "71.0 ± 1.4", "36.0 ± 1.4", "-",
                     "0.512 ± 0.000", "1.5 ± 0.0"]  # fmt: skip
    assert "old" not in written and written.startswith("before") and written.endswith("after\n")
    assert with_tables(written, plan) == written
    assert "Other" not in written.split("after")[0]


def test_a_page_that_names_no_table_of_the_plan_is_told(plan):
    with pytest.raises(InputError, match="has no table nothing"):
        with_tables("<!-- runs: nothing -->\n<!-- end of runs -->", plan)


@pytest.mark.parametrize(
    "text", ["", "[1]", "sets: {}", "sets: {}\ntables: {a: {rows: {}}}", "a: [", "sets: 3"]
)
def test_what_is_no_plan_is_told(tmp_path, text):
    (tmp_path / "zoo.yaml").write_text(text)
    with pytest.raises(InputError, match=r"zoo\.yaml"):
        read_plan(tmp_path / "zoo.yaml")


def test_every_run_of_the_documents_has_a_config_that_takes_its_keys():
    plan = read_plan(ROOT / "docs/runs/zoo.yaml")
    found = {}
    for run in plan.runs():
        if run.seed > 1:
            continue
        config, overrides, base = run.config, dict(run.overrides), run.base and run.base.training
        if run.is_evaluation:
            config, overrides = run.base.config, {**run.base.overrides, **overrides}
        cfg = get_config(config, [word for pair in overrides.items() for word in pair])
        kind = str(cfg), run.train, run.is_evaluation, base
        found.setdefault(kind, set()).add(run.training)
    # Runs are one where their words are: two that train the same must not be told otherwise.
    assert [runs for runs in found.values() if len(runs) > 1] == []


def test_no_record_is_of_no_run_of_the_plan():
    plan = read_plan(ROOT / "docs/runs/zoo.yaml")
    records = set((ROOT / "docs/runs").rglob("*-seed?.json"))
    assert records and records <= {path_of(plan, run) for run in plan.runs()}
    others = set((ROOT / "docs/runs").rglob("*.json")) - records
    assert {path.name for path in others} <= {"paired.json"}


def test_the_documents_say_what_the_records_say():
    plan = read_plan(ROOT / "docs/runs/zoo.yaml")
    for path in PAGES:
        page = (ROOT / path).read_text()
        assert with_tables(page, plan) == page, "run `iou-d2 zoo write`"
    assert (ROOT / "MODEL_ZOO.md").read_text() == model_zoo(plan), "run `iou-d2 zoo write`"


def test_a_table_without_a_record_is_a_line(plan):
    page = model_zoo(plan)
    assert "## Losses" not in page and page.count("|") == 0
    assert page.endswith("## Not trained yet\n\n- Losses: 8 runs, `--only 'losses/*'`\n")


def test_the_parts_of_the_commands_on_the_page_make_the_commands_of_the_plan(plan, tmp_path):
    run = plan.run("losses", "cells", "plain", 1)
    keep(plan, run, finished(tmp_path / "out", run))
    page = model_zoo(plan)
    assert "Not trained yet" not in page
    whole = next(line for line in page.splitlines() if line.startswith("    iou-d2"))
    cells = re.findall(r"\| other +\|(.*)\|", page, re.IGNORECASE)[-1].split("|")
    config, own = (cell.strip(" `") for cell in cells)
    dataset = re.search(r"\| cells +\| `(.*)`", page)[1]
    typed = whole.replace("CONFIG", config).replace("SET", dataset).replace(" N ", " 1 ")
    words = shlex.split(typed.replace("...", own))[1:]
    run = plan.run("losses", "cells", "other", 1)
    found = dict(zip(words[7::2], words[8::2]))
    assert words[:7] == run.arguments()[:7]
    assert {**found} == dict(zip(run.arguments()[7::2], run.arguments()[8::2]))


def test_runs_that_train_the_same_share_a_record(plan, tmp_path):
    text = (
        PLAN
        + """
  again:
    title: "Again"
    sets: [shapes, cells]
    seeds: [1]
    rows:
      same: {name: "Same", config: quick/vfnet_shapes, overrides: {SOLVER.MAX_ITER: "3"}}
      longer: {name: "Longer", config: quick/vfnet_shapes, overrides: {SOLVER.MAX_ITER: "30"}}
"""
    )
    plan.path.write_text(text)
    plan = read_plan(plan.path)
    run = plan.run("losses", "cells", "plain", 1)
    path = keep(plan, run, finished(tmp_path / "out", run))
    same = plan.run("again", "cells", "same", 1)
    assert path_of(plan, same) == path and kept(plan, same) == kept(plan, run)
    for table, dataset, row, seed in (
        ("again", "cells", "longer", 1),
        ("again", "shapes", "same", 1),
        ("losses", "cells", "plain", 2),
    ):
        assert kept(plan, plan.run(table, dataset, row, seed)) is None
    # A record of its own goes before that of another table.
    keep(plan, same, finished(tmp_path / "own", same, ap=50.0))
    assert kept(plan, same)["results"]["bbox/AP"] == 50.0
    assert kept(plan, run)["results"]["bbox/AP"] == 40.0


def test_records_in_another_folder_come_beside_those_of_the_plan(plan, tmp_path):
    first, second = (plan.run("losses", "cells", "plain", seed) for seed in (1, 2))
    keep(plan, first, finished(tmp_path / "1", first))
    apart = read_plan(plan.path, tmp_path / "records")
    path = keep(apart, second, finished(tmp_path / "2", second))
    assert path == tmp_path / "records" / f"{second.name}.json"
    assert kept(apart, first) and kept(apart, second)
    assert kept(plan, first) and kept(plan, second) is None
    keep(apart, first, finished(tmp_path / "again", first, ap=50.0))
    assert kept(apart, first)["results"]["bbox/AP"] == 50.0
    assert kept(plan, first)["results"]["bbox/AP"] == 40.0


def test_rows_of_other_devices_are_told_apart(plan, tmp_path):
    plain, other = (plan.run("losses", "cells", row, 1) for row in ("plain", "other"))
    keep(plan, plain, finished(tmp_path / "plain", plain))
    keep(plan, other, finished(tmp_path / "other", other, devices=["GPU X"]))
    lines = model_zoo(plan).splitlines()
    cells = [[x.strip() for x in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    by_row = {row[0]: row for row in cells if len(row) == 8}
    assert by_row["cells"][-1] == "device"
    assert by_row["Plain"][-1] == "cpu, 1 thread" and by_row["Other"][-1] == "GPU X"
    assert any("--num-gpus 0-OR-1 " in line for line in lines)
    keep(plan, plain, finished(tmp_path / "plain", plain, devices=["GPU X"]))
    page = model_zoo(plan)
    assert "device |" not in page and "--num-gpus 1 " in page and "GPU X; torch" in page
