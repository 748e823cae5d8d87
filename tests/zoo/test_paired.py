"""Paired tests of rows: the records they are of, how runs make them, where they stand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from iou_d2.analysis.average_precision import coco_precision, summarize_ap
from iou_d2.analysis.paired_test import METRICS
from iou_d2.commands import paired_runs
from iou_d2.commands import zoo as command
from iou_d2.errors import InputError
from iou_d2.report import Subject
from iou_d2.zoo import comparisons, keep, keep_test, kept_test, model_zoo, read_plan
from random_coco import make_random_coco
from zoo_runs import PLAN, finished

ROOT = Path(__file__).parents[2]


def figures(difference: float) -> dict[str, float]:
    return {"difference": difference, "low": difference - 1, "high": difference + 2, "p": 0.5}


def a_test(ap: float, seeds: tuple[int, ...] = (1, 2)) -> dict:
    about = {"seeds": list(seeds), "images": 9, "draws": 10}
    return {**about, **{metric: figures(ap) for metric in METRICS}}


@pytest.fixture
def plan(plan):
    plan.path.write_text(PLAN.replace("other: {name", "other: {baseline: plain, name"))
    return read_plan(plan.path)


@pytest.fixture
def comparison(plan):
    return next(comparisons(plan))


def keep_runs(plan, tmp_path, aps: dict[str, tuple[float, float]]) -> None:
    """Records on the first set, of each row with the AP of seed 1 and 2."""
    for row, of_seeds in aps.items():
        for seed, ap in enumerate(of_seeds, start=1):
            run = plan.run("losses", "cells", row, seed)
            keep(plan, run, finished(tmp_path / "out" / run.name, run, ap))


def test_rows_are_held_against_their_own_baseline_or_that_of_the_table(plan, chain):
    found = [(one.name, one.baseline) for one in comparisons(plan)]
    assert found == [("losses/cells/other", "plain"), ("losses/shapes/other", "plain")]
    found = [(one.name, one.baseline) for one in comparisons(chain)]
    assert found == [("chain/cells/branch", "detector"), ("chain/cells/soft", "detector")]
    plan.path.write_text(PLAN.replace("other: {name", "other: {baseline: nothing, name"))
    with pytest.raises(InputError, match="row other is held against nothing, no row of it"):
        read_plan(plan.path)


def test_a_test_stands_until_its_records_change(plan, comparison, tmp_path):
    keep_runs(plan, tmp_path, {"plain": (40.0, 41.0), "other": (42.0, 42.0)})
    assert kept_test(plan, comparison) is None
    path = keep_test(plan, comparison, a_test(1.5))
    assert path == plan.path.parent / "losses" / "cells" / "paired.json"
    assert kept_test(plan, comparison)["seeds"] == [1, 2]
    keep_runs(plan, tmp_path, {"other": (42.0, 42.1)})
    assert kept_test(plan, comparison) is None


def test_a_test_of_other_results_than_the_records_is_not_kept(plan, comparison, tmp_path):
    keep_runs(plan, tmp_path, {"plain": (40.0, 41.0), "other": (42.0, 42.0)})
    with pytest.raises(InputError, match="AP is 1.6000 by the results, but another one by the"):
        keep_test(plan, comparison, a_test(1.6))
    assert not list(plan.path.parent.rglob("paired.json"))


def test_a_test_may_be_of_some_seeds_and_of_none_without_a_record(plan, comparison, tmp_path):
    keep_runs(plan, tmp_path, {"plain": (40.0, 40.0), "other": (42.0, 43.0)})
    for seeds, gain in (((2,), 3.0), ((1,), 2.0), ((1, 2), 2.5)):
        keep_test(plan, comparison, a_test(gain, seeds))
        assert kept_test(plan, comparison)["seeds"] == list(seeds)
    for seeds in ((1, 3), ()):
        with pytest.raises(InputError, match="another one by the records"):
            keep_test(plan, comparison, a_test(2.0, seeds))


@pytest.mark.parametrize("text", ["", "[1]", '{"other": 1}', '{"other": {"baseline": "plain"}}'])
def test_a_damaged_file_of_tests_is_named(plan, comparison, text):
    path = plan.path.parent / "losses" / "cells" / "paired.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(InputError, match=r"paired\.json holds no tests of rows"):
        kept_test(plan, comparison)


def test_the_page_has_the_gain_whom_it_is_over_and_its_interval(plan, comparison, tmp_path):
    keep_runs(plan, tmp_path, {"other": (42.0, 42.0)})

    def cells(row: str) -> list[str]:
        line = next(one for one in model_zoo(plan).splitlines() if one.startswith(f"| {row}"))
        return [cell.strip() for cell in line.strip("|").split("|")]

    assert cells("Other")[-1] == "-"
    keep_runs(plan, tmp_path, {"plain": (40.0, 41.0)})
    assert cells("Other")[-1] == "+1.5 ± 0.7 over Plain" and cells("Plain")[-1] == ""
    keep_test(plan, comparison, a_test(1.5))
    assert cells("cells")[-2:] == ["gain in AP", "95 % over images"]
    assert cells("Other")[-2:] == ["+1.5 ± 0.7 over Plain", "+0.5 to +3.5"]
    assert cells("Plain")[-2:] == ["", ""]
    keep_test(plan, comparison, a_test(2.0, (1,)))
    assert cells("Other")[-1] == "+1.0 to +4.0 (1 of 2 seeds)"


@pytest.fixture
def results(plan, tmp_path, monkeypatch):
    """Folder of a run -> its results on one set of images, whose AP the records have."""
    truth, best = make_random_coco(0, images=20, classes=2)
    of_runs = {}
    for row, share in (("plain", 0.4), ("other", 0.8)):
        aps = []
        for seed in (1, 2):
            run = plan.run("losses", "cells", row, seed)
            rng = np.random.default_rng(seed)
            found = [one for one in best if rng.random() < share]
            of_runs[tmp_path / "out" / run.name] = found
            aps.append(summarize_ap(coco_precision(truth, found), [])["AP"])
        keep_runs(plan, tmp_path, {row: tuple(aps)})

    def subject_of_run(folder, name, command):
        found = of_runs.get(folder)
        return Subject(name, truth=truth, results=found, notes=[f"{folder} holds no results."])

    monkeypatch.setattr(paired_runs, "subject_of_run", subject_of_run)
    return of_runs


def pair(plan, tmp_path, *more: str) -> None:
    output = str(tmp_path / "out")
    command.main(["--plan", str(plan.path), "pair", "--output", output, "--draws", "40", *more])


def test_a_row_is_tested_from_the_results_of_its_runs(plan, comparison, results, tmp_path, capsys):
    pair(plan, tmp_path)
    said = capsys.readouterr().out
    test = kept_test(plan, comparison)
    gain = np.mean(list(comparison.gains(plan).values()))
    assert test["AP"]["difference"] == pytest.approx(gain, abs=1e-3)
    assert 0 < test["AP"]["low"] < gain < test["AP"]["high"]
    assert (test["images"], test["draws"], test["seeds"]) == (20, 40, [1, 2])
    assert f"losses/cells/other, seeds 1, 2: AP {gain:+.1f} over plain, " in said
    assert "losses/shapes/other is left out: no seed has a record of it and of its base" in said
    pair(plan, tmp_path, "--only", "losses/cells/*")
    assert capsys.readouterr().out == ""


def test_runs_that_are_not_there_leave_a_row_out(plan, comparison, results, tmp_path, capsys):
    missing = plan.run("losses", "cells", "plain", 2)
    del results[tmp_path / "out" / missing.name]
    pair(plan, tmp_path, "--only", "losses/cells/*")
    assert f"{missing.name} holds no results." in capsys.readouterr().out
    assert kept_test(plan, comparison) is None
    (tmp_path / "out" / missing.name / "run.json").unlink()
    pair(plan, tmp_path, "--only", "losses/cells/*")
    assert "losses/cells/other, seeds 1: AP" in capsys.readouterr().out
    assert kept_test(plan, comparison)["seeds"] == [1]
    pair(plan, tmp_path, "--only", "losses/cells/*")
    assert capsys.readouterr().out == ""
    other = plan.run("losses", "cells", "other", 1)
    (tmp_path / "out" / other.name / "run.json").write_text("{}")
    pair(plan, tmp_path, "--only", "losses/cells/*")
    said = capsys.readouterr().out
    assert f"the run that {plan.path.parent / other.name}.json is of is not under" in said
    assert kept_test(plan, comparison)["seeds"] == [1]


def test_wrong_words_are_told(plan, tmp_path):
    with pytest.raises(InputError, match=r"No row of .* with a baseline is called losses/cells/pl"):
        pair(plan, tmp_path, "--only", "losses/cells/plain")
    with pytest.raises(InputError, match="--draws is at least 1, but it is 0"):
        pair(plan, tmp_path, "--draws", "0")


def test_every_test_of_the_documents_is_of_their_records():
    plan = read_plan(ROOT / "docs/runs/zoo.yaml")
    rows = {(one.table, one.dataset, one.row): one for one in comparisons(plan)}
    for path in (ROOT / "docs/runs").rglob("paired.json"):
        table, dataset = path.parts[-3:-1]
        for row in json.loads(path.read_text()):
            one = rows[table, dataset, row]
            test = kept_test(plan, one)
            assert test, f"delete {row} in {path}, and run `iou-d2 zoo pair`"
            for metric in METRICS:
                low, high = test[metric]["low"], test[metric]["high"]
                assert low <= test[metric]["difference"] <= high, (row, metric)
