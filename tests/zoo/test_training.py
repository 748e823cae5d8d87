"""`iou-d2 zoo train`, with a small script in the place of each training."""

from __future__ import annotations

import signal
import sys
import threading
import time

import pytest
import torch

from iou_d2.commands import zoo as command
from iou_d2.errors import InputError
from iou_d2.zoo import keep, kept, read_plan
from zoo_runs import finished

# Takes the arguments of Python. Each training waits until TOGETHER have started.
SCRIPT = """#!/bin/sh
all="$*"
folder=${{all#*OUTPUT_DIR }}
folder=${{folder%% *}}
echo "$all" > "$folder/words"
echo "$OMP_NUM_THREADS" > "$folder/threads"
touch "{started}/$$"
for i in $(seq 100); do
    [ $(ls "{started}" | wc -l) -ge {together} ] && break
    sleep 0.1
done
[ $i -lt 100 ] || exit 3
{then}
"""


@pytest.fixture
def words(plan, tmp_path):
    return ["--plan", str(plan.path), "train", "--data", "x", "--output", str(tmp_path / "out")]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function: what a training does once `together` have started."""

    def make(then: str, together: int = 1) -> None:
        started = tmp_path / "started"
        started.mkdir()
        path = tmp_path / "python"
        path.write_text(SCRIPT.format(started=started, together=together, then=then))
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return make


def test_training_goes_on_where_it_was_stopped(plan, words, monkeypatch, capsys):
    trained = []

    def train_one(plan, run, args, stop):
        trained.append(run.name)
        keep(plan, run, finished(args.output / run.name, run))
        return run.row != "other"

    monkeypatch.setattr(command, "train_one", train_one)
    with pytest.raises(InputError, match=r"2 runs failed: losses/cells/other-seed1"):
        command.main([*words, "--only", "losses/cells/*"])
    assert "4 runs to train, about 0.7 hours." in capsys.readouterr().out
    command.main([*words, "--only", "losses/cells/*", "*/shapes/plain-*"])
    assert trained[4:] == ["losses/shapes/plain-seed1", "losses/shapes/plain-seed2"]
    # Two runs, 90 seconds each as those before.
    assert "2 runs to train, about 0.1 hours." in capsys.readouterr().out


def test_jobs_run_beside_one_another_and_a_failure_stops_no_other(
    plan, words, stand_in, tmp_path, capsys
):
    failing = plan.run("losses", "cells", "plain", 2)
    for run in plan.runs():
        finished(tmp_path / "out" / run.name, run)
    stand_in(f'case "$folder" in */{failing.name}) exit 1;; esac', together=4)
    with pytest.raises(InputError, match=f"1 runs failed: {failing.name}"):
        command.main([*words, "--only", "losses/cells/*", "--jobs", "4", "--threads", "1"])
    out = capsys.readouterr().out
    assert "4 runs to train, about 0.2 hours with 4 at a time." in out
    assert f"{failing.name} failed; " in out and out.count(" is kept in ") == 3
    records = {run.name for run in plan.runs() if kept(plan, run)}
    assert records == {run.name for run in plan.runs() if run.dataset == "cells"} - {failing.name}
    folder = tmp_path / "out" / failing.name
    assert (folder / "threads").read_text() == "1\n"
    assert "--num-gpus 0 " in (folder / "words").read_text()
    assert "DATALOADER.NUM_WORKERS 0" in (folder / "words").read_text()


def test_jobs_start_in_the_order_of_the_plan(plan, words, stand_in, tmp_path, capsys):
    for run in plan.runs():
        finished(tmp_path / "out" / run.name, run)
    stand_in("exit 0")
    command.main(words)
    out = capsys.readouterr().out.splitlines()
    started = [line.split(":")[0] for line in out if ": iou-d2 " in line]
    assert started == [run.name for run in plan.runs()]


def test_a_run_that_leaves_no_record_is_told_and_passed_over(plan, words, stand_in, capsys):
    stand_in("exit 0")
    with pytest.raises(InputError, match="2 runs failed"):
        command.main([*words, "--only", "*/plain-seed1"])
    assert "plain-seed1 is not kept: " in capsys.readouterr().out


def test_an_interrupt_ends_what_runs_and_starts_no_more(
    plan, words, stand_in, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "GRACE", 0.3)
    first = next(plan.runs())
    for run in plan.runs():
        finished(tmp_path / "out" / run.name, run)
    # The first has finished before; the second would run for a minute, deaf to interrupts.
    stand_in(f"case \"$folder\" in */{first.name}) exit 0;; esac; trap '' INT; exec sleep 60")
    second = tmp_path / "out" / list(plan.runs())[1].name / "words"

    def interrupt() -> None:
        while not second.exists():
            time.sleep(0.05)
        time.sleep(0.5)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # A worker of pytest-xdist ignores interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    try:
        with pytest.raises(SystemExit, match="Stopped"):
            command.main(words)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 20
    out = capsys.readouterr().out
    assert out.count(": iou-d2 train") == 2 and "other-seed1 is stopped." in out
    assert [run.name for run in plan.runs() if kept(plan, run)] == [first.name]


def test_records_are_kept_where_they_are_wanted(plan, words, stand_in, tmp_path):
    for run in plan.runs():
        finished(tmp_path / "out" / run.name, run)
    run = next(plan.runs())
    keep(plan, run, tmp_path / "out" / run.name)
    before = sorted(plan.path.parent.rglob("*"))
    stand_in("exit 0")
    records = tmp_path / "records"
    command.main(["--records", str(records), *words, "--only", "losses/*-seed1"])
    assert len(list(records.rglob("*.json"))) == 3
    assert sorted(plan.path.parent.rglob("*")) == before
    assert all(kept(read_plan(plan.path, records), x) for x in plan.runs() if x.seed == 1)


def test_a_gpu_is_given_to_the_runs_where_there_is_one(
    plan, words, stand_in, tmp_path, monkeypatch
):
    run = next(plan.runs())
    finished(tmp_path / "out" / run.name, run)
    stand_in("exit 0")
    words = [*words, "--only", run.name, "--gpus", "1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs CUDA"):
        command.main(words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command.main(words)
    assert "--num-gpus 1 " in (tmp_path / "out" / run.name / "words").read_text()


def test_no_jobs_are_refused(words):
    with pytest.raises(InputError, match="--jobs is at least 1"):
        command.main([*words, "--jobs", "0"])
