"""Runs that go on from others: a training from another's model, and evaluations of one."""

from __future__ import annotations

import pytest

from iou_d2.commands import zoo as command
from iou_d2.errors import InputError
from iou_d2.zoo import keep, kept, model_zoo, read_plan, trained_in, with_tables
from zoo_runs import CHAIN, PLAN, finished


def runs_of(chain, seed=1):
    return [chain.run("chain", "cells", row, seed) for row in ("detector", "branch", "soft")]


def test_what_is_typed_for_each(chain):
    detector, branch, soft = (run.arguments("/data", "out", base="B") for run in runs_of(chain))
    assert "MODEL.WEIGHTS" not in detector and detector[0] == branch[0] == "train"
    assert branch[branch.index("MODEL.WEIGHTS") + 1] == "B/model_final.pth"
    assert branch[branch.index("--train") + 1] == "coco:/data/a.json"
    assert soft[:5] == ["eval", "--num-gpus", "0", "--config", "B/config.yaml"]
    assert soft[5:9] == ["OUTPUT_DIR", "out", "MODEL.WEIGHTS", "B/model_final.pth"]
    assert soft[9:] == ["MODEL.IOU_NET.NMS", "soft_linear"]


def test_a_record_is_of_the_runs_before_it_too(chain, tmp_path):
    *_, soft = runs_of(chain)
    path = keep(chain, soft, finished(tmp_path / "out", soft))
    assert "somewhere" not in path.read_text()
    record = kept(chain, soft)
    assert record["overrides"] == {"MODEL.IOU_NET.NMS": "soft_linear"}
    assert record["base"]["base"]["config"] == "quick/faster_rcnn_shapes"
    changed = PLAN + CHAIN.replace("faster_rcnn_shapes}", "vfnet_shapes}")
    chain.path.write_text(changed)
    changed = read_plan(chain.path)
    with pytest.raises(InputError, match="has base .* train anew"):
        kept(changed, changed.run("chain", "cells", "soft", 1))


def test_other_settings_of_an_evaluation_are_not_kept(chain, tmp_path):
    *_, soft = runs_of(chain)
    folder = finished(tmp_path / "out", soft, overrides=["MODEL.IOU_NET.NMS", "plain"])
    with pytest.raises(InputError, match="chain/cells/soft-seed1 is of"):
        keep(chain, soft, folder)
    (folder / "evaluation.json").rename(folder / "run.json")
    with pytest.raises(InputError, match=r"holds no evaluation\.json"):
        keep(chain, soft, folder)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("starts_from: detector", "starts_from: soft", "goes on from soft, no row before it"),
        ("evaluates: branch", "evaluates: nothing", "goes on from nothing, no row before it"),
        ("evaluates: branch", "config: quick/a, evaluates: branch", "a row has a `config`"),
        ("evaluates: branch, ", "", "row soft: a row has a `config`"),
        ("evaluates: branch", "evaluates: branch, starts_from: branch", "a row has a `config`"),
        ("baseline: detector", "baseline: nothing", "has no row nothing, its baseline"),
    ],
)
def test_rows_that_make_no_chain_are_told(chain, old, new, message):
    chain.path.write_text(PLAN + CHAIN.replace(old, new))
    with pytest.raises(InputError, match=message):
        read_plan(chain.path)


@pytest.fixture
def train(chain, tmp_path, monkeypatch):
    """A function: the words after `zoo train` -> the processes it started, as (name, words); each
    leaves what a run leaves, but for those that it is told to fail."""
    runs = {run.name: run for run in chain.runs()}
    output, failing = tmp_path / "out", []

    def make(*words: str, fail: str = ""):
        started = []

        def train_apart(arguments, threads, printed, stop):
            name = str(printed.parent.relative_to(output))
            started.append((name, arguments))
            if name == fail:
                return 1
            finished(printed.parent, runs[name])
            if not runs[name].is_evaluation:
                (printed.parent / "model_final.pth").touch()
            return 0

        monkeypatch.setattr(command, "train_apart", train_apart)
        failing.clear()
        where = ["--plan", str(chain.path), "train", "--data", "x", "--output", str(output)]
        try:
            command.main([*where, *words])
        except InputError as error:
            failing.append(str(error))
        return started, list(failing)

    return make


def test_a_run_waits_for_the_one_that_it_goes_on_from(chain, train, tmp_path):
    started, failed = train("--only", "chain/*", "--jobs", "3")
    names = [name for name, _ in started]
    assert not failed and len(names) == 6
    for seed in (1, 2):
        order = [names.index(run.name) for run in runs_of(chain, seed)]
        assert order == sorted(order)
        branch = tmp_path / "out" / f"chain/cells/branch-seed{seed}"
        words = dict(started)[f"chain/cells/soft-seed{seed}"]
        assert words[0] == "eval" and f"{branch}/config.yaml" in words and "--resume" not in words
    assert all(kept(chain, run) for run in runs_of(chain))
    assert train("--only", "chain/*")[0] == []


def test_what_is_needed_and_gone_is_trained_again(chain, train, tmp_path):
    train("--only", "chain/cells/detector-seed1")
    detector, _, soft = runs_of(chain)
    (tmp_path / "out" / detector.name / "model_final.pth").unlink()
    started, failed = train("--only", soft.name)
    assert [name for name, _ in started] == [run.name for run in runs_of(chain)]
    assert not failed and kept(chain, soft)


def test_what_is_not_of_the_recorded_model_is_left_out(chain, train, tmp_path, capsys):
    detector, branch, soft = runs_of(chain)
    keep(chain, detector, finished(tmp_path / "elsewhere", detector, ap=12.0))
    for expected in ([detector.name], []):  # the second time the model is there
        started, failed = train("--only", soft.name)
        assert [name for name, _ in started] == expected and failed
        said = capsys.readouterr().out
        assert f"{branch.name} is left out: {tmp_path / 'out' / detector.name} holds" in said
    assert kept(chain, detector)["results"]["bbox/AP"] == 12.0
    assert kept(chain, branch) is kept(chain, soft) is None
    (tmp_path / "out" / detector.name / "run.json").unlink()
    assert train("--only", soft.name)[1]


def test_what_goes_on_from_a_failed_run_is_left_out(chain, train, capsys):
    started, failed = train("--only", "chain/*-seed1", fail="chain/cells/branch-seed1")
    assert [name for name, _ in started] == [run.name for run in runs_of(chain)[:2]]
    assert failed == ["2 runs failed: chain/cells/branch-seed1, chain/cells/soft-seed1."]
    assert "soft-seed1 is left out: chain/cells/branch-seed1" in capsys.readouterr().out


def test_neither_record_nor_model_of_another_table_stands_for_what_is_gone_on_from(chain, tmp_path):
    chain.path.write_text(PLAN + CHAIN + CHAIN.replace("chain:", "again:"))
    plan = read_plan(chain.path)
    output = tmp_path / "out"
    for row in ("detector", "soft"):
        run = plan.run("chain", "cells", row, 1)
        keep(plan, run, finished(output / run.name, run))
        (output / run.name / "model_final.pth").touch()
        other = plan.run("again", "cells", row, 1)
        stands = row == "soft"
        assert (kept(plan, other) is not None) == stands
        assert (trained_in(plan, other, output) is not None) == stands


def test_tables_have_the_gain_over_a_baseline_seed_by_seed(chain, tmp_path):
    aps = {"detector": (40.0, 43.0), "branch": (41.0, 46.0), "soft": (39.5,)}
    for row, values in aps.items():
        for seed, ap in enumerate(values, start=1):
            run = chain.run("chain", "cells", row, seed)
            keep(chain, run, finished(tmp_path / run.name, run, ap))
    page = with_tables("<!-- runs: chain -->\n<!-- end of runs -->", chain)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[1:-1]]
    assert rows[0] == ["cells", "AP", "AP75", "r", "minutes", "gain in AP"]
    # Gains of 1 and 3: mean 2, standard deviation sqrt(2).
    assert [row[-1] for row in rows[2:]] == ["", "+2.0 ± 1.4", "-0.5"]
    assert [row[1] for row in rows[2:]] == ["41.5 ± 2.1", "43.5 ± 3.5", "39.5"]


@pytest.mark.parametrize("aps", [(40.0, None), (None, 41.0), (None, None)])
def test_there_is_no_gain_without_an_ap(chain, tmp_path, aps):
    for row, ap in zip(("detector", "branch"), aps):
        run = chain.run("chain", "cells", row, 1)
        results = {"bbox/AP": ap, "bbox/AP75": 1.0, "localization/pearson_confidence": 0.5}
        keep(chain, run, finished(tmp_path / run.name, run, seconds=60.0, results=results))
    page = with_tables("<!-- runs: chain -->\n<!-- end of runs -->", chain)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[1:-1]]
    assert rows[3][0] == "Branch" and rows[3][-1] == "-"


def test_the_model_zoo_says_how_each_is_made(chain, tmp_path):
    detector, *_ = runs_of(chain)
    keep(chain, detector, finished(tmp_path / "out", detector))
    page = model_zoo(chain)
    line = next(line for line in page.splitlines() if line.startswith("| Branch"))
    assert "MODEL.WEIGHTS '(output of Detector)/model_final.pth'" in line
    assert "    iou-d2 eval --num-gpus 0 --config BASE/config.yaml MODEL.WEIGHTS BASE/" in page
    cells = [
        x.strip() for x in next(x for x in page.splitlines() if x.startswith("| Soft")).split("|")
    ]
    assert cells[1:-1] == ["Soft", "Branch", "`MODEL.IOU_NET.NMS soft_linear`"]
