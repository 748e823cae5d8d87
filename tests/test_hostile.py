"""The fuzzer finds what is planted: errors, crashes, hangs, lost memory and started processes."""

from __future__ import annotations

import os
import signal
import time

import pytest

from hostile import mutate
from hostile.judge import READ, Surface, require, require_nothing_ran
from hostile.runner import run
from iou_d2.errors import InputError


def crash():
    os.kill(os.getpid(), signal.SIGKILL)


def start_a_process():
    os.system("true")
    require_nothing_ran()


def fill_the_memory():
    bytearray(2**31)


def end():
    raise SystemExit(3)


def refuse():
    raise InputError("Whether a refusal is right is for the judge to say.")


def fails(planted, tmp_path, seconds=10.0):
    """The counts of tries 0 to 3 of a surface, of which try 2 does what is planted."""

    def judge(number):
        if number == 2:
            planted()
        return READ

    surface = Surface(
        "planted", "", 4, lambda folder: None, lambda _, one: one.number, judge, seconds
    )
    return run(surface, 0, 0, 4, tmp_path)


@pytest.mark.parametrize(
    ("planted", "kind"),
    [
        (lambda: require(False, "a wrong result"), "Failure"),
        (refuse, "InputError"),
        (end, "SystemExit"),
        (fill_the_memory, "MemoryError"),
        (start_a_process, "Failure"),
        (crash, "crash by SIGKILL"),
    ],
)
def test_what_is_planted_is_found_and_the_run_goes_on(planted, kind, tmp_path):
    count = fails(planted, tmp_path)
    assert count.tries == 4
    assert sum(count.failures.values()) == 1
    assert next(iter(count.failures)).startswith(kind)
    text = (tmp_path / "planted-0-2" / "FAILURE.txt").read_text()
    assert text.startswith("--seed 0 --only planted --try 2")


def test_a_hang_is_found(tmp_path):
    count = fails(lambda: time.sleep(60), tmp_path, seconds=1.0)
    assert count.tries == 4 and list(count.failures) == ["hang of more than 1 s"]


def test_without_a_fault_nothing_fails(tmp_path):
    count = fails(lambda: None, tmp_path)
    assert (count.tries, count.refused, dict(count.failures)) == (4, 0, {})


def test_a_plan_is_known_by_its_name_and_number():
    first = [repr(mutate.plan("seed 0", number)) for number in (0, 7, 60)]
    mutate._batch.cache_clear()
    assert [repr(mutate.plan("seed 0", number)) for number in (0, 7, 60)] == first
    assert len(set(first)) == 3
    assert repr(mutate.plan("seed 1", 0)) != first[0]


def test_json_holds_what_no_value_of_python_is():
    assert mutate.to_json({"a": 1, "a@twice": 2}).count(b'"a"') == 2
    assert b"[" * 100_000 in mutate.to_json({"a": "@deep"})
