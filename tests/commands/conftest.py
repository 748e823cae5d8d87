from __future__ import annotations

import os

import pytest

from command_line import TINY, command, run


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The environment variables of commands that run as processes of their own, without a GPU."""
    datasets = tmp_path_factory.mktemp("datasets")
    return {
        **os.environ,
        "DETECTRON2_DATASETS": str(datasets),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.getcwd(),
    }


@pytest.fixture(scope="session")
def trained(environment, tmp_path_factory):
    """A run of 4 iterations: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    arguments = (*TINY, "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", str(folder))
    return folder, run(environment, command(*arguments))
