from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

from iou_d2.engine import launch as module
from iou_d2.engine.launch import Place, free_port, launch, place_in_environment
from iou_d2.errors import InputError


def write_place(folder):
    """The file `rank` in `folder` says where the process stands, and what all ranks add up to."""
    total = torch.tensor(float(comm.get_rank() + 1))
    dist.all_reduce(total)
    text = f"{comm.get_world_size()} {comm.get_local_rank()} {comm.get_local_size()} {total:g}"
    (folder / f"{comm.get_rank()}").write_text(f"{text} {torch.get_num_threads()}")


def launch_machine(rank, folder, url):
    arguments = {"num_processes": 2, "num_machines": 2, "machine_rank": rank, "dist_url": url}
    launch(write_place, (folder,), num_gpus=0, **arguments)


def fail_alone():
    if comm.get_rank() == 1:
        raise ArithmeticError("rank 1 cannot count")
    dist.barrier()


def refuse_all():
    raise InputError("The file x is empty.")


def refuse_second():
    if comm.get_rank() == 1:
        raise InputError("The file x is empty.")
    dist.barrier()


@pytest.mark.parametrize("function", [refuse_all, refuse_second])
def test_an_input_error_is_said_once_and_ends_with_status_1(function, capfd):
    with pytest.raises(SystemExit) as ended:
        launch(function, num_gpus=0, num_processes=2)
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert said.count("The file x is empty.") == 1 and "Traceback" not in said


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_one_process_is_this_one(monkeypatch):
    seen = []
    launch(lambda *arguments: seen.append((os.getpid(), *arguments)), (1, 2), num_gpus=0)
    assert seen == [(os.getpid(), 1, 2)] and comm.get_world_size() == 1


def test_processes_of_two_machines_know_their_places(tmp_path):
    url = f"tcp://127.0.0.1:{free_port()}"
    context = torch.multiprocessing.get_context("spawn")
    machines = [context.Process(target=launch_machine, args=(r, tmp_path, url)) for r in range(2)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join(timeout=250)  # a busy machine starts six processes slowly
    assert [machine.exitcode for machine in machines] == [0, 0]
    for rank in range(4):
        assert (tmp_path / str(rank)).read_text() == f"4 {rank % 2} 2 10 1"


def test_processes_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    launch(write_place, (tmp_path,), num_gpus=0, num_processes=2)
    cores = len(os.sched_getaffinity(0))
    for rank in range(2):
        threads = int((tmp_path / str(rank)).read_text().split()[-1])
        assert 1 <= threads <= max(1, cores // 2)


def test_an_error_of_one_process_ends_the_others():
    start = time.monotonic()
    with pytest.raises(Exception, match="rank 1 cannot count"):
        launch(fail_alone, num_gpus=0, num_processes=2)
    assert time.monotonic() - start < 100


def test_the_environment_is_joined(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_join", lambda *arguments: seen.append(arguments))
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    launch(write_place, (tmp_path,), num_gpus=0)
    assert seen == [("env://", Place(3, 4, 1, 2), False, write_place, (tmp_path,))]


def test_places_in_the_environment():
    assert place_in_environment({}) is None
    assert place_in_environment({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) is None
    assert place_in_environment({"RANK": "1", "WORLD_SIZE": "2"}) == Place(1, 2, 0, 1)
    for local in ({"LOCAL_RANK": "1"}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}):
        with pytest.raises(ValueError, match="each machine needs the same number of processes"):
            place_in_environment({"RANK": "1", "WORLD_SIZE": "4", **local})


def test_contradictions_are_named(monkeypatch):
    with pytest.raises(ValueError, match="Several machines need a --dist-url"):
        launch(fail_alone, num_gpus=0, num_machines=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(ValueError, match="torchrun has started the processes"):
        launch(fail_alone, num_gpus=0, num_processes=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="give --num-gpus 0 too"):
        launch(fail_alone, num_processes=2)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes of this machine want a GPU each, and it has"):
        launch(fail_alone)
