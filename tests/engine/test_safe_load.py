from __future__ import annotations

import builtins
import collections
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from iou_d2.engine.safe_load import read_checkpoint_file, read_class_names
from iou_d2.errors import InputError


class Attack:
    """Unpickled by pickle, it makes a file."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def write(content, path, kind, protocol):
    """`content` as a .pkl, as torch.save writes it now, or as it once did."""
    if kind == "pickle":
        path = path.with_suffix(".pkl")
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        return path
    torch.save(
        content,
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=kind == "zip",
    )
    return path


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_an_attack_is_refused_and_does_nothing(tmp_path, kind, protocol):
    mark = tmp_path / "mark"
    for number, attack in enumerate(
        (
            Attack(os.mkdir, str(mark)),
            Attack(builtins.eval, f"open({str(mark)!r}, 'w')"),
            Attack(builtins.getattr, np.zeros(1), "tofile"),
            Attack(np.save, str(mark), [1]),
        )
    ):
        content = {"state_dict": {"w": torch.ones(2) if kind != "pickle" else 1}, "meta": attack}
        path = write(content, tmp_path / f"{number}.pth", kind, protocol)
        with pytest.raises(ValueError, match=r"is refused, and nothing|is damaged or no check"):
            read_checkpoint_file(str(path))
        assert not list(tmp_path.glob("mark*"))
    pickle.loads(pickle.dumps(Attack(os.mkdir, str(mark))))
    assert mark.exists()  # pickle itself would have done it


def test_the_refusal_names_what_was_asked_for(tmp_path):
    for kind in ("pickle", "zip"):
        path = write({"x": Attack(os.mkdir, "x")}, tmp_path / "a.pth", kind, 2)
        with pytest.raises(ValueError, match=r"it asks for posix.mkdir, which is no part"):
            read_checkpoint_file(str(path))


def test_arrays_in_a_pickle(tmp_path):
    content = {
        "model": collections.OrderedDict(
            w=np.arange(6, dtype=np.float32).reshape(2, 3),
            half=np.ones(2, np.float16),
            columns=np.asfortranarray(np.arange(6).reshape(2, 3)),
            swapped=np.arange(3, dtype=">i4"),
            truth=np.array([True, False]),
            empty=np.zeros((0, 4), np.float32),
        ),
        "scalar": np.float32(2.5),
        "count": np.array(3),
        "__author__": "somebody",
        "matching_heuristics": True,
    }
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path = write(content, tmp_path / "a.pth", "pickle", protocol)
        read = read_checkpoint_file(str(path))
        for name, array in content["model"].items():
            assert read["model"][name].dtype == array.dtype, name
            np.testing.assert_array_equal(read["model"][name], array)
        assert (read["scalar"], read["count"], read["__author__"]) == (2.5, 3, "somebody")
    # As NumPy 1 and NumPy 2 name it.
    data = pickle.dumps(content, protocol=2)
    names = (b"numpy.core.multiarray", b"numpy._core.multiarray")
    for name in names:
        path.write_bytes(data.replace(names[1], names[0]).replace(names[0], name))
        assert read_checkpoint_file(str(path))["model"]["w"].sum() == 15


def test_arrays_that_would_read_foreign_memory_are_refused(tmp_path):
    """NumPy itself takes the bytes of an object array for pointers."""
    path = tmp_path / "a.pkl"
    for array in (np.array([None, 1]), np.zeros(2, [("a", "O")]), np.zeros(2, "U4")):
        path.write_bytes(pickle.dumps({"model": {"w": array}}, protocol=2))
        with pytest.raises(ValueError, match=r"it asks for numpy.dtype\('[OVU]"):
            read_checkpoint_file(str(path))
    data = pickle.dumps({"model": {"w": np.arange(5, dtype=np.uint8)}}, protocol=2)
    assert data.count(b"K\x05\x85") == 1  # the shape, (5,)
    for shape in (b"K\x06\x85", b"J\xff\xff\xff\x7f\x85", b"K\x04\x85"):
        path.write_bytes(data.replace(b"K\x05\x85", shape))
        with pytest.raises(ValueError, match="a.pkl is damaged or no checkpoint"):
            read_checkpoint_file(str(path))


def test_the_logs_of_mmengine_are_passed_over(tmp_path, monkeypatch):
    """HistoryBuffer as mmengine pickles it: an object with arrays."""
    buffer = type("HistoryBuffer", (), {"__module__": "mmengine.logging.history_buffer"})
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = buffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    log = buffer()
    log._log_history, log.max_length = np.arange(5.0), 1000
    content = {
        "state_dict": {"w": torch.arange(3.0)},
        "message_hub": {"log_scalars": {"train/loss": log}, "best": np.float64(0.4)},
        "meta": {"epoch": 12},
    }
    before = set(torch.serialization.get_safe_globals())
    for kind in ("zip", "legacy"):
        path = write(content, tmp_path / f"{kind}.pth", kind, 2)
        read = read_checkpoint_file(str(path))
        assert read["state_dict"]["w"].tolist() == [0, 1, 2] and read["meta"]["epoch"] == 12
        inert = read["message_hub"]["log_scalars"]["train/loss"]
        assert type(inert) is not buffer and not vars(inert)
    assert set(torch.serialization.get_safe_globals()) == before


def test_files_that_are_no_checkpoints(tmp_path):
    good = tmp_path / "good.pth"
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, good)
    data = good.read_bytes()
    pickled = pickle.dumps({"model": {"w": np.zeros(1000)}})
    cases = {
        "half.pth": data[: len(data) // 2],
        "start.pth": data[:10],
        "empty.pth": b"",
        "text.pth": b"<html>404</html>",
        "half.pkl": pickled[: len(pickled) // 2],
        "empty.pkl": b"",
        "zip.pkl": data,
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged or no checkpoint"):
            read_checkpoint_file(str(tmp_path / name))
    torch.save([torch.zeros(1)], good)
    with pytest.raises(ValueError, match="good.pth holds a list and not a dict"):
        read_checkpoint_file(str(good))
    for missing in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            read_checkpoint_file(str(missing))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_the_class_names_of_a_checkpoint(tmp_path, kind):
    weights = {"w": np.ones(2)} if kind == "pickle" else {"w": torch.ones(2)}
    for names in (["cat", "dog"], [], None):
        content = {"model": weights, **({} if names is None else {"class_names": names})}
        assert read_class_names(str(write(content, tmp_path / "a.pth", kind, 2))) == names
    for wrong in ("cat", [1, 2], {"cat": 1}):
        path = write({"class_names": wrong}, tmp_path / "a.pth", kind, 2)
        with pytest.raises(InputError, match="class_names in .* are no list of names"):
            read_class_names(str(path))


def test_the_class_names_are_read_without_the_tensors(tmp_path, monkeypatch):
    path = write(
        {"model": {"w": torch.ones(9)}, "class_names": ["a"]}, tmp_path / "a.pth", "zip", 2
    )
    load = torch.load
    seen = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(k["mmap"]) or load(*a, **k))
    assert read_class_names(str(path)) == ["a"] and seen == [True]


def test_a_trusted_file_makes_its_objects(tmp_path):
    for number, kind in enumerate(("pickle", "zip", "legacy")):
        mark = tmp_path / str(number)
        path = write({"x": Attack(os.mkdir, str(mark))}, tmp_path / "a.pth", kind, 2)
        read_checkpoint_file(str(path), trust=True)
        assert mark.is_dir()


def test_files_made_to_fill_the_memory_are_refused(tmp_path):
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(200 << 20))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(InputError, match=r"bomb.pth would unpack to 209715200 bytes"):
        read_checkpoint_file(str(bomb))
    (tmp_path / "memo.pkl").write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    with pytest.raises(InputError, match=r"memo.pkl is damaged .* a part 4294967295"):
        read_checkpoint_file(str(tmp_path / "memo.pkl"))


def test_a_pickle_cannot_change_how_later_ones_are_read(tmp_path):
    """BUILD with a pair sets attributes of any object, such as the defaults of a function."""
    good = write({"w": np.arange(6).reshape(2, 3)}, tmp_path / "good.pth", "pickle", 5)
    for function in (b"numpy.core.numeric\n_frombuffer", b"_codecs\nencode", b"numpy\nndarray"):
        change = b"\x80\x02c" + function + b"\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b."
        (tmp_path / "a.pkl").write_bytes(change)
        with pytest.raises(InputError, match="damaged"):
            read_checkpoint_file(str(tmp_path / "a.pkl"))
        assert read_checkpoint_file(str(good))["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
