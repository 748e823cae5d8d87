"""What glibc's malloc does with freed memory, counted by the pages that the kernel has to clear."""

import os
import platform
import resource
import subprocess
import sys

import pytest

from iou_d2.engine import memory

counts_pages = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
    reason="This is another malloc, or a kernel that counts no page faults.",
)
ROUNDS = 10
# Takes, writes and frees 64 MB, again and again; prints what keep_freed_memory says and the page
# faults of all rounds but the first.
SCRIPT = f"""
import ctypes, resource, sys
from iou_d2.engine.memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def take_and_free():
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

take_and_free()
before = faults()
for _ in range({ROUNDS}):
    take_and_free()
print(kept, faults() - before)
"""


def run(how: str, **said: str) -> tuple[str, int]:
    """What SCRIPT prints where the user has said nothing but `said` about malloc."""
    silent = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env={**silent, **said},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@counts_pages
def test_freed_memory_is_used_again():
    _, as_it_comes = run("leave")
    kept, faults = run("keep")
    assert kept == "True"
    assert faults < ROUNDS < as_it_comes


@counts_pages
@pytest.mark.parametrize(
    "said",
    [
        {"MALLOC_MMAP_MAX_": "65536"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"},
    ],
)
def test_what_the_user_said_stays(said):
    kept, faults = run("keep", **said)
    assert kept == "False"
    assert faults > ROUNDS


def test_another_malloc_is_left_alone(monkeypatch):
    def missing(name: str):
        raise OSError(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    assert not memory.keep_freed_memory()
