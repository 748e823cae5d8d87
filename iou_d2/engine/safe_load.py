"""Checkpoint files read without running anything that is in them."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from iou_d2.errors import InputError, MissingFileError

# A file of `torch.save` is not compressed. What unpacks to more than this is made to fill memory.
_UNPACKED_FACTOR, _UNPACKED_BYTES = 4, 64 << 20


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


class Call:
    """A function that a pickle may call. A pickle may also set attributes of what it was given: not
    of this, for functions are shared by all that is read later."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a function is no container")


# NumPy pickles arrays and scalars as calls of these, which NumPy 2 has in `numpy._core`.
NUMPY = {
    "numpy.ndarray": Array,
    "numpy.dtype": Dtype,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy.core.multiarray.scalar": Call(lambda dtype, data: make_array(data, dtype)),
    "numpy.core.numeric._frombuffer": Call(make_array),
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
        "_codecs.encode": Call(lambda text, _: text.encode("latin1")),
        "__builtin__.bytes": Call(lambda: b""),
    }

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return self.ALLOWED[f"{module}.{name}"]


def fill_arrays(content: object) -> object:
    """`content` with arrays of NumPy for each Array in its dicts and lists."""
    if isinstance(content, dict):
        return {name: fill_arrays(value) for name, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(fill_arrays(value) for value in content)
    return content.values if isinstance(content, Array) else content


def read_checkpoint_file(path: str, trust: bool = False) -> dict:
    """The dict in a .pkl of NumPy arrays, or in a file of `torch.save` under any other name.

    Args:
        path: a file, or an address that Detectron2 knows, such as detectron2:// and https://.
        trust: let the file make any object and so run any code, as `pickle` does.

    Raises:
        MissingFileError, InputError: sentences that name the file. A pickle that asks for
            anything but tensors, arrays and plain Python values is refused before it gets it.
    """
    return _dict_in(path, _read_trusted if trust else _read)


def peek_checkpoint(path: str) -> dict:
    """As `read_checkpoint_file`, with tensors that are read off the disk when they are used."""
    return _dict_in(path, _read_lazily)


def read_class_names(path: str) -> list[str] | None:
    """`class_names` of a checkpoint of iou_d2; None where it has none. Tensors stay on the disk.

    Raises what `read_checkpoint_file` does.
    """
    names = peek_checkpoint(path).get("class_names")
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InputError(f"class_names in {path} are no list of names.")
    return list(names)


def local_file(path: str) -> str:
    """Where `path` or what was fetched of an address lies. Raises MissingFileError."""
    path = os.fspath(path)
    if "://" in path:
        try:
            path = PathManager.get_local_path(path)
        except Exception as error:  # whatever the handler of the address raises
            reason = " ".join(str(error).split())
            raise MissingFileError(f"{path} could not be fetched: {reason}") from error
    if os.path.isdir(path):
        raise MissingFileError(f"There is no file {path}, but a folder.")
    if not os.path.isfile(path):
        raise MissingFileError(f"There is no file {path}.")
    return path


def _dict_in(path: str, read: Callable[[str], object]) -> dict:
    file = local_file(path)
    try:
        content = read(file)
    except (OSError, InputError):
        raise
    except Exception as error:  # a broken pickle can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise InputError(
                f"{path} is refused, and nothing in it was run: it asks for {refused[1]}, which "
                "is no part of a checkpoint."
            ) from None
        raise InputError(f"{path} is damaged or no checkpoint.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} and not a dict of tensors.")
    return content


def _read(file: str) -> object:
    if file.endswith(".pkl"):
        _check_memo(file)
        with open(file, "rb") as opened:
            return fill_arrays(ArrayUnpickler(opened, encoding="latin1").load())
    return _read_tensors(file, mmap=False)


def _read_lazily(file: str) -> object:
    if file.endswith(".pkl"):
        return _read(file)
    return _read_tensors(file, mmap=zipfile.is_zipfile(file))


def _read_tensors(file: str, mmap: bool) -> object:
    _check_unpacked_size(file)
    with torch.serialization.safe_globals(LOGS):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def _read_trusted(file: str) -> object:
    if file.endswith(".pkl"):
        with open(file, "rb") as opened:
            return pickle.load(opened, encoding="latin1")
    return torch.load(file, map_location="cpu", weights_only=False)


def _check_memo(file: str) -> None:
    """A pickle that numbers its parts far beyond their count makes `pickle` fill the memory."""
    size = os.path.getsize(file)
    with open(file, "rb") as opened:
        for opcode, number, _ in pickletools.genops(opened):
            if opcode.name in ("PUT", "LONG_BINPUT") and number > size:
                raise InputError(f"{file} is damaged or no checkpoint: it has a part {number}.")


def _check_unpacked_size(file: str) -> None:
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > _UNPACKED_FACTOR * os.path.getsize(file) + _UNPACKED_BYTES:
        raise InputError(
            f"{file} would unpack to {size} bytes, which is no checkpoint as torch.save writes it."
        )
