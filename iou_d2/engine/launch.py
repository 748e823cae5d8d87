"""How a run gets its processes: one, several on one machine or on several, or those of torchrun.

Several GPUs are the business of Detectron2's `launch`, which refuses CPUs in 0.5. CPU processes,
and those that torchrun started, form their group here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as launch_gpus

from iou_d2.errors import InputError

from .compat import create_local_process_group, forget_process_groups
from .memory import keep_freed_memory

# The exit status of a process that has told the user's error; and seconds for which others wait.
SAID, GRACE = 77, 5


class Place(NamedTuple):
    """Where a process stands: among all `world_size`, and among the `local_size` of its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int


def launch(
    function: Callable,
    arguments: tuple = (),
    *,
    num_gpus: int = 1,
    num_processes: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> None:
    """Run `function(*arguments)` in every process of a run, and return when this machine has done.

    Called by a process of torchrun, it joins the group of the others. Otherwise it starts the
    processes of this machine; one on a single machine is this process itself.

    Args:
        function: importable by name where processes are started.
        num_gpus: GPUs on each machine, with a process each; 0 is the CPU. More than there are, and
            any number where there is no CUDA, is one CPU process or `num_processes`.
        num_processes: CPU processes on each machine.
        num_machines, machine_rank: all machines call this, each with its number from 0 on.
        dist_url: where they meet, "tcp://HOST:PORT" of machine 0; "auto" on a single machine.

    Raises:
        InputError: the arguments, or they and the environment, contradict each other.
    """
    use_cuda = num_gpus > 0 and torch.cuda.is_available()
    if use_cuda and num_processes > 1:
        raise InputError("--num-processes counts processes on the CPU: give --num-gpus 0 too.")
    if num_gpus > 1 and not use_cuda:
        count = "one CPU process is" if num_processes == 1 else f"{num_processes} are"
        logging.getLogger("detectron2").warning(f"--num-gpus needs CUDA, so {count} used.")
    per_machine = num_gpus if use_cuda else num_processes
    if per_machine * num_machines <= 1:
        place = place_in_environment(os.environ)
        if place is None:
            function(*arguments)
        else:
            _join("env://", place, use_cuda, function, arguments)
        return

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError(
            "torchrun has started the processes: leave out --num-gpus, --num-processes and "
            "--num-machines, or start without torchrun."
        )
    if use_cuda:
        with _ending_as_its_processes():
            work = (function, arguments)
            launch_gpus(_in_a_sentence, num_gpus, num_machines, machine_rank, dist_url, args=work)
        return
    if dist_url == "auto":
        if num_machines > 1:
            raise InputError("Several machines need a --dist-url, tcp://HOST:PORT of machine 0.")
        dist_url = f"tcp://127.0.0.1:{free_port()}"
    machine = (num_processes, num_machines, machine_rank, dist_url)
    work = (dict(os.environ), *machine, function, arguments)
    with _ending_as_its_processes():
        method = _start_method(function)
        mp.start_processes(_start_process, work, num_processes, start_method=method)


def _start_method(function: Callable) -> str:
    """Processes are forks of one that has loaded what `function` needs, which takes seconds, and
    has done nothing else; where a system has no forks, each loads it."""
    if "forkserver" not in mp.get_all_start_methods():
        return "spawn"
    mp.get_context("forkserver").set_forkserver_preload([function.__module__])
    return "forkserver"


@contextlib.contextmanager
def _ending_as_its_processes() -> Iterator[None]:
    """Exit with the status of a process that has ended by an exit, and so has said why."""
    try:
        yield
    except mp.ProcessExitedException as error:
        if error.exit_code != SAID:
            raise
        sys.exit(1)


def _in_a_sentence(function: Callable, arguments: tuple) -> None:
    """Run `function(*arguments)`; an InputError ends this process, and the first process of the
    run says it. All have the same input, but an error of one alone is said by it."""
    try:
        function(*arguments)
    except InputError as error:
        rank = int(dist.get_rank()) if dist.is_initialized() else 0
        if rank > 0:  # the first process, where it fails alike, ends the others before they speak
            time.sleep(GRACE)
        print(str(error), file=sys.stderr, flush=True)
        os._exit(SAID)  # not by way of the others, who may wait for this process


def place_in_environment(environment: Mapping[str, str]) -> Place | None:
    """The place that RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE give, as torchrun sets them;
    None where there is no or only one process.

    Without the last two there is one process on each machine, as in the pods of Kubernetes.

    Raises InputError where the four contradict each other.
    """
    if "RANK" not in environment or int(environment.get("WORLD_SIZE", "1")) <= 1:
        return None
    place = Place(
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
    )
    if place.local_rank >= place.local_size or place.world_size % place.local_size:
        raise InputError(
            f"The environment gives LOCAL_RANK {place.local_rank}, LOCAL_WORLD_SIZE "
            f"{place.local_size} and WORLD_SIZE {place.world_size}: each machine needs the same "
            "number of processes, counted from 0."
        )
    return place


def free_port() -> int:
    """A TCP port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start_process(
    local_rank: int,
    environment: dict[str, str],
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    function: Callable,
    arguments: tuple,
) -> None:
    os.environ.clear()  # a fork has that of the process which it is a fork of
    os.environ.update(environment)
    keep_freed_memory()
    threading.Thread(target=_end_with, args=(mp.parent_process(),), daemon=True).start()
    place = Place(
        rank=machine_rank * num_processes + local_rank,
        world_size=num_machines * num_processes,
        local_rank=local_rank,
        local_size=num_processes,
    )
    _join(dist_url, place, False, _in_a_sentence, (function, arguments))


def _end_with(parent: BaseProcess) -> None:
    """End this process when `parent` has ended, which did not end it, and so was killed."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _join(url: str, place: Place, use_cuda: bool, function: Callable, arguments: tuple) -> None:
    """Run `function(*arguments)` as one process of a group."""
    if use_cuda:
        _use_own_gpu(place)
    else:
        _share_cores(place.local_size)
    backend = "nccl" if use_cuda else "gloo"
    dist.init_process_group(backend, url, rank=place.rank, world_size=place.world_size)
    create_local_process_group(place.local_size)
    function(*arguments)
    dist.barrier()  # a process that leaves early takes the connections of the others with it
    # The threads of gloo end with the last reference to their group. One that still holds a tensor
    # when the interpreter ends aborts the process.
    forget_process_groups()
    dist.destroy_process_group()


def _use_own_gpu(place: Place) -> None:
    if place.local_size > torch.cuda.device_count():
        raise InputError(
            f"{place.local_size} processes of this machine want a GPU each, and it has "
            f"{torch.cuda.device_count()}; --num-gpus 0 trains on the CPU."
        )
    torch.cuda.set_device(place.local_rank)


def _share_cores(processes: int) -> None:
    """Give each process its share of the threads, unless the user (or torchrun) has set them."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
