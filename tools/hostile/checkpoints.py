"""Checkpoints, .pth and .pkl: nothing in them runs, and only values and arrays come out."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iou_d2.engine.safe_load import Inert, read_checkpoint_file
from iou_d2.errors import InputError

from .judge import READ, Surface, Try, refused, require, require_nothing_ran
from .mutate import edit_bytes, edit_tree

PLAIN = (dict, list, tuple, set, str, bytes, int, float, complex, bool, type(None))
ARRAYS = (torch.Tensor, np.ndarray, np.generic)


class Runs:
    """A pickle of it asks the reader to call `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _payloads(canary: str) -> list:
    return [
        Runs(os.system, f"touch {canary}"),
        Runs(eval, f"open({canary!r}, 'w').close()"),
        Runs(exec, f"open({canary!r}, 'w').close()"),
        Runs(open, canary, "w"),
        Runs(getattr, canary, "upper"),
        Runs(np.zeros, 10**11),
        Runs(torch.zeros, 10**11),
        Runs(bytearray, 10**12),
        Runs(np.load, canary),
        Path(canary),
        np.array([Runs(os.system, f"touch {canary}")], dtype=object),
        np.zeros(3, dtype="U9"),
        np.zeros(2, dtype=[("a", "f4")]),
        np.zeros(2, dtype="M8[s]"),
        np.float64(3),
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(4).to_sparse(),
        {1, 2},
        1 + 2j,
    ]


def _content(is_torch: bool) -> dict:
    generator = np.random.default_rng(0)
    arrays = {f"layer{i}.weight": generator.normal(size=(3, i + 1)).astype("f4") for i in range(3)}
    weights = {k: torch.from_numpy(v) for k, v in arrays.items()} if is_torch else arrays
    return {"model": weights, "class_names": ["a", "b"], "iteration": 7, "__author__": "x"}


def _dump(content: Any, how: int, is_torch: bool) -> bytes:
    if not is_torch:
        return pickle.dumps(content, protocol=(0, 2, 4, 5)[how % 4])
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=bool(how % 4))
    return stream.getvalue()


def _make(one: Try, ending: str) -> Path:
    plan, is_torch = one.plan, ending == "pth"
    path, content = one.folder / f"weights.{ending}", _content(is_torch)
    if plan.special % 4 == 0:
        payloads = _payloads(str(one.folder / "CANARY"))
        content["extra"] = payloads[plan.special // 4 % len(payloads)]
        path.write_bytes(_dump(content, plan.special // 7, is_torch))
    elif plan.special % 4 == 1:
        edited = edit_tree(content, plan.edits)
        path.write_bytes(_dump(edited, plan.special, is_torch))
    else:
        path.write_bytes(edit_bytes(_dump(content, plan.special // 4, is_torch), plan.edits))
    return path


def judge(path: Path) -> str:
    canary = path.parent / "CANARY"
    try:
        content = read_checkpoint_file(str(path))
    except InputError as error:
        require_nothing_ran(canary)
        return refused(error, path.name)
    require_nothing_ran(canary)
    require(isinstance(content, dict), f"a {type(content).__name__} was read")
    _require_plain(content)
    return READ


def _require_plain(value: Any) -> None:
    # Inert stands for an entry of a log, which is no weight, and has neither content nor methods.
    require(isinstance(value, (*PLAIN, *ARRAYS, Inert)), f"{type(value)} is read")
    if isinstance(value, np.ndarray):
        require(value.dtype.kind in "fiub", f"an array of {value.dtype} is read")
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple, set)):
        for part in parts:
            _require_plain(part)


SURFACES = {
    f"checkpoints_{ending}": Surface(
        f"checkpoints_{ending}",
        f".{ending}: nothing runs, only arrays and plain values come out",
        tries=2500,
        prepare=lambda folder: folder,
        make=lambda prepared, one, ending=ending: _make(one, ending),
        judge=judge,
    )
    for ending in ("pth", "pkl")
}
