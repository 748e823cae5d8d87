from __future__ import annotations

import subprocess
import sys

import pytest

from iou_d2.commands import install_detectron2
from iou_d2.commands.install_detectron2 import NO_C_MODULE, Replacement, mend

SCRIPT = "tools/install_detectron2.py"


def test_replacements_are_made(tmp_path):
    (tmp_path / "a.py").write_text("np.int) np.int32 np.int)")
    mend(tmp_path, [Replacement("a.py", "np.int)", "int)", 2)])
    assert (tmp_path / "a.py").read_text() == "int) np.int32 int)"


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_places_stops_with_a_sentence(tmp_path, count):
    (tmp_path / "a.py").write_text("old old")
    with pytest.raises(SystemExit, match=f"a.py of .* has 'old' at 2 places where {count} were"):
        mend(tmp_path, [Replacement("a.py", "old", "new", count)])
    assert (tmp_path / "a.py").read_text() == "old old"


def test_missing_operators_say_what_is_missing_and_where_to_get_it():
    module = {}
    exec(NO_C_MODULE, module)
    with pytest.raises(RuntimeError, match="_C.nms_rotated is a compiled .*github.com.*detectron2"):
        module["__getattr__"]("nms_rotated")(1, 2)
    with pytest.raises(AttributeError):
        module["__getattr__"]("__path__")


def test_without_torch_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="Detectron2 needs torch, which is not installed."):
        install_detectron2.prepare_build()


@pytest.mark.parametrize(("version", "calls"), [("65.5.0", 1), ("80.9.0", 0)])
def test_an_old_setuptools_is_replaced(monkeypatch, version, calls):
    installed = []
    monkeypatch.setattr(install_detectron2.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(install_detectron2, "pip", lambda *arguments: installed.append(arguments))
    install_detectron2.prepare_build()
    assert len(installed) == calls and all("setuptools>=77,<82" in call for call in installed)


def test_a_pip_that_fails_ends_in_a_sentence():
    with pytest.raises(SystemExit, match="`pip nonsense` failed"):
        install_detectron2.pip("nonsense")


def test_an_importable_detectron2_is_left_alone():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    assert "is left as it is." in done.stdout


def test_a_detectron2_that_does_not_import_stops_with_a_sentence(tmp_path):
    broken = tmp_path / "detectron2"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('half a package')")
    done = subprocess.run(
        [sys.executable, SCRIPT],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert done.returncode == 1
    assert "does not import" in done.stderr and "half a package" in done.stderr
