"""Processes that begin with torch, Detectron2 and iou_d2 loaded, which takes seconds: forks of one
process that has loaded them and done nothing else."""

from __future__ import annotations

import multiprocessing
import os

# Read when torch is loaded: forks of a busy machine have one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["iou_d2.commands.train", "iou_d2.commands.detect"])
