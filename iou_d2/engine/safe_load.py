"""Checkpoint files read without running anything that is in them."""

from __future__ import annotations

import os
import pickle
import re
from collections import OrderedDict

import numpy as np
import torch


class Inert:
    """Stands for a class that is not loaded: takes every argument and does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class Dtype:
    """A dtype of numbers. That of NumPy would make objects, which are pointers, of bytes."""

    def __init__(self, code: str, *args):
        if not re.fullmatch(r"[fiub]\d+", code):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r})")
        self.code = code

    def __setstate__(self, state: tuple):
        order = state[1]
        self.code = (order if order in ("<", ">") else "") + self.code


class Array:
    """An array that has still to get its values."""

    def __init__(self, *args):
        self.values = None

    def __setstate__(self, state: tuple):
        _, shape, dtype, is_fortran, data = state
        self.values = make_array(data, dtype, shape, "F" if is_fortran else "C")


def make_array(data: bytes | str, dtype: Dtype, shape: tuple = (), order: str = "C") -> np.ndarray:
    """An array of numbers that can be written to; `shape` and the length of `data` have to fit."""
    if isinstance(data, str):  # bytes of Python 2
        data = data.encode("latin1")
    return np.frombuffer(data, np.dtype(dtype.code)).reshape(shape, order=order).copy()


# NumPy pickles arrays and scalars as calls of these, which NumPy 2 has in `numpy._core`.
NUMPY = {
    "numpy.ndarray": Array,
    "numpy.dtype": Dtype,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy.core.multiarray.scalar": lambda dtype, data: make_array(data, dtype),
    "numpy.core.numeric._frombuffer": make_array,
}
NUMPY.update({name.replace(".core.", "._core."): value for name, value in NUMPY.items()})

# What the logs in mmengine's checkpoints are made of. None of it is a weight.
LOGS = [
    type(name.rpartition(".")[2], (Inert,), {"__module__": name.rpartition(".")[0]})
    for name in ("mmengine.logging.history_buffer.HistoryBuffer", *NUMPY)
]


class ArrayUnpickler(pickle.Unpickler):
    """Reads arrays of numbers in dicts and lists, and refuses everything else."""

    ALLOWED = {
        **NUMPY,
        "collections.OrderedDict": OrderedDict,
        # Bytes in protocol 2.
        "_codecs.encode": lambda text, _: text.encode("latin1"),
        "__builtin__.bytes": lambda: b"",
    }

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return self.ALLOWED[f"{module}.{name}"]


def fill_arrays(content: object) -> object:
    """`content` with arrays of NumPy for each Array in its dicts."""
    if isinstance(content, dict):
        return {name: fill_arrays(value) for name, value in content.items()}
    return content.values if isinstance(content, Array) else content


def read_checkpoint_file(path: str) -> dict:
    """The dict in a .pkl of NumPy arrays, or in a file of `torch.save` under any other name.

    Raises:
        FileNotFoundError, ValueError: sentences that name the file. A pickle that asks for
            anything but tensors, arrays and plain Python values is refused before it gets it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if path.endswith(".pkl"):
            with open(path, "rb") as file:
                content = fill_arrays(ArrayUnpickler(file, encoding="latin1").load())
        else:
            with torch.serialization.safe_globals(LOGS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{path} is refused, and nothing in it was run: it asks for {refused[1]}, which "
                "is no part of a checkpoint."
            ) from None
        raise ValueError(f"{path} is damaged or no checkpoint.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} and not a dict of tensors.")
    return content
