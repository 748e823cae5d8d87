from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from forks import FORKS, run_forks
from iou_d2.engine import launch as module
from iou_d2.engine.launch import Place, free_port, launch, place_in_environment
from iou_d2.errors import InputError


def write_place(folder):
    """The file `rank` in `folder` says where the process stands, and what all ranks add up to."""
    total = torch.tensor(float(comm.get_rank() + 1))
    dist.all_reduce(total)
    text = f"{comm.get_world_size()} {comm.get_local_rank()} {comm.get_local_size()} {total:g}"
    (folder / f"{comm.get_rank()}").write_text(f"{text} {torch.get_num_threads()}")


def tell_new_processes_where_modules_are():
    """The fork server of Python 3.11 is not told sys.path: it would find nothing to load ahead, and
    each process would load torch for itself."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)


def launch_machine(rank, folder, url):
    module._start_method = lambda function: "fork"  # that of its own choice loads torch anew
    arguments = {"num_processes": 2, "num_machines": 2, "machine_rank": rank, "dist_url": url}
    launch(write_place, (folder,), num_gpus=0, **arguments)


def set_place(rank, port):
    """As torchrun does for two processes."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def join_with_five_threads(rank, folder, omp_num_threads, port):
    """As a process of torchrun, which sets OMP_NUM_THREADS or leaves the threads as they are."""
    os.environ.pop("OMP_NUM_THREADS", None)
    if omp_num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = omp_num_threads
    torch.set_num_threads(5)
    set_place(rank, port)
    launch(write_place, (folder,), num_gpus=0)


def gather_and_reduce():
    """What evaluation and training do together."""
    comm.all_gather([comm.get_rank()])
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    assert "pt_gloo_runloop" in names_of_threads()


def names_of_threads():
    return {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}


def join_and_write_threads(rank, folder, port):
    set_place(rank, port)
    launch(gather_and_reduce, num_gpus=0)
    (folder / str(rank)).write_text(" ".join(names_of_threads()))


def write_environment(folder):
    """Also the pages of 4 kB that the kernel clears while a tensor of 64 MB is made 30 times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        torch.zeros(16 << 20)
    cleared = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    (folder / f"{comm.get_rank()}").write_text(f"{os.environ['IOU_D2_TEST']}, {cleared}")


def fail_alone():
    if comm.get_rank() == 1:
        raise ArithmeticError("rank 1 cannot count")
    dist.barrier()


def refuse_all():
    raise InputError("The file x is empty.")


def refuse_second():
    if comm.get_rank() == 1:
        raise InputError("The file y is empty.")
    dist.barrier()


def wait(folder):
    (folder / f"pid{comm.get_rank()}").write_text(str(os.getpid()))
    time.sleep(250)


def be_refused_and_wait(folder):
    """In a program of its own, whose standard error is a file."""
    tell_new_processes_where_modules_are()
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT), 2)
    for function in (refuse_all, refuse_second):
        with pytest.raises(SystemExit) as ended:
            launch(function, num_gpus=0, num_processes=2)
        assert ended.value.code == 1
    launch(wait, (folder,), num_gpus=0, num_processes=2)


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def within_seconds(seconds, is_so):
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.05)
    return is_so()


def test_errors_are_said_once_and_nobody_outlives_the_launcher(tmp_path):
    launcher = FORKS.Process(target=be_refused_and_wait, args=(tmp_path,))
    launcher.start()
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    assert within_seconds(200, lambda: all(x.exists() and x.read_text() for x in files))
    said = (tmp_path / "said").read_text()
    assert said.count("The file x is empty.") == said.count("The file y is empty.") == 1
    assert "Traceback" not in said
    launcher.kill()
    assert within_seconds(30, lambda: not any(is_running(int(x.read_text())) for x in files))


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
    run_forks(launch_machine, 2, tmp_path, url)
    for rank in range(4):
        assert (tmp_path / str(rank)).read_text() == f"4 {rank % 2} 2 10 1"


@pytest.mark.parametrize(("said", "share"), [(None, 2), ("5", 5)])
def test_processes_share_the_cores_unless_the_user_shares_them(tmp_path, said, share):
    run_forks(join_with_five_threads, 2, tmp_path, said, free_port())
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == f"2 {rank} 2 3 {share}"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed by Linux")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    run_forks(join_and_write_threads, 2, tmp_path, free_port())
    for rank in range(2):
        assert "pt_gloo_runloop" not in (tmp_path / str(rank)).read_text()


def test_processes_have_the_environment_of_their_launcher_and_keep_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("IOU_D2_TEST", "as it is now")
    launch(write_environment, (tmp_path,), num_gpus=0, num_processes=2)
    for rank in range(2):
        environment, cleared = (tmp_path / f"{rank}").read_text().split(", ")
        assert environment == "as it is now"
        assert int(cleared) < 30 * 16384 / 2


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
