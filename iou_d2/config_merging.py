"""How config files and KEY VALUE pairs become part of a config, with sentences for what cannot."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode, downgrade_config, upgrade_config
from detectron2.config.compat import guess_version

from .config_reading import read_config_file
from .errors import InputError, UnknownKeyError
from .old_keys import rename_old_keys

# What Detectron2 raises where a value has another type, is no value or is nested too deeply.
_UNMERGED = (ValueError, KeyError, AssertionError, SyntaxError, RecursionError, MemoryError)


def merge_file(cfg: CfgNode, config_file: str) -> None:
    """Merge the file at a path, over what it is based on, into `cfg`, in place.

    Raises what `iou_d2.load_config` does.
    """
    content = read_config_file(config_file)
    old = _flat(content, config_file)
    architecture = old.get("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE)
    values = rename_old_keys(old, architecture, config_file)
    _check_keys(cfg, values, config_file)
    before = _flat(cfg, config_file)
    try:
        _merge_version(cfg, CfgNode(_nested(values)), config_file)
    except _UNMERGED as error:
        raise InputError(f"{config_file} cannot be merged: {_reason(error)}") from error
    _require_values(before, cfg, values, config_file)


def merge_overrides(cfg: CfgNode, overrides: Sequence[str]) -> None:
    """Merge KEY VALUE pairs of a command line into `cfg`, in place.

    Raises what `iou_d2.load_config` does.
    """
    if len(overrides) % 2:
        raise InputError(f"Overrides are pairs of KEY VALUE, but {list(overrides)} has no pairs.")
    values = dict(zip(overrides[::2], overrides[1::2]))
    values = rename_old_keys(values, cfg.MODEL.META_ARCHITECTURE, "The command line")
    _check_keys(cfg, values, "The command line")
    before = _flat(cfg, "The command line")
    for key, value in values.items():
        _merge_override(cfg, key, value)
    _require_values(before, cfg, values, "The command line")


def _merge_version(cfg: CfgNode, loaded: CfgNode, config_file: str) -> None:
    """As Detectron2 merges a file, which may be of an earlier version of its keys."""
    version = loaded.get("VERSION", None)
    if version is None:
        version = guess_version(loaded, config_file)
    if version not in (1, cfg.VERSION):
        raise ValueError(f"VERSION {version} is not one of 1 and {cfg.VERSION}")
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(loaded)
        return
    earlier = downgrade_config(cfg, to_version=version)
    earlier.merge_from_other_cfg(loaded)
    upgraded = upgrade_config(earlier)
    cfg.clear()
    cfg.update(upgraded)


def _merge_override(cfg: CfgNode, key: str, value: Any) -> None:
    try:
        cfg.merge_from_list([key, value])
    except _UNMERGED as error:
        raise InputError(
            f"The command line sets {key} to {str(value)[:60]}, which cannot be: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The message in one line that is not endless."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 400 else f"{text[:400]} ..."


def _flat(node: dict, where: str, prefix: str = "") -> dict[str, Any]:
    """The values in `node` by dotted name, such as "MODEL.RETINANET.NUM_CLASSES"."""
    values = {}
    for name, value in node.items():
        if not isinstance(name, str):
            raise InputError(f"{where} sets {prefix}{name}, which is not a config key.")
        if isinstance(value, dict):
            values.update(_flat(value, where, f"{prefix}{name}."))
        else:
            values[prefix + name] = value
    return values


def _nested(values: dict[str, Any]) -> dict:
    """The inverse of `_flat`."""
    root = {}
    for key, value in values.items():
        *nodes, name = key.split(".")
        node = root
        for part in nodes:
            node = node.setdefault(part, {})
        node[name] = value
    return root


def _check_keys(cfg: CfgNode, keys: Iterable[str], where: str) -> None:
    valid = list(_flat(cfg, where))
    for key in keys:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]
            shown = key if key.isprintable() and len(key) <= 100 else repr(key[:100])
            raise UnknownKeyError(
                f"{where} sets {shown}, which is not a config key. The nearest valid key is {near}."
            )


def _require_values(before: dict, cfg: CfgNode, keys: Iterable[str], where: str) -> None:
    """Raise an InputError where null took the place of a value, which Detectron2 allows."""
    after = _flat(cfg, where)
    for key in keys:
        if before.get(key) is not None and after.get(key, 0) is None:
            raise InputError(f"{where} sets {key} to null, but it needs a value.")
