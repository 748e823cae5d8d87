"""YAML configs read without running anything that is in them, with the files they are based on."""

from __future__ import annotations

import codecs
import copy
import os

import yaml
from detectron2.utils.file_io import PathManager

from .config_arithmetic import compute
from .errors import InputError, MissingFileError

_BASE = "_BASE_"
_LARGEST_FILE = 4 << 20
_MOST_NODES = 100_000  # with each alias counted as what it stands for
_LONGEST_CHAIN = 50
_LARGEST_INT = 2**63
_TAG = "tag:yaml.org,2002:"


def read_config_file(path: str) -> dict:
    """The content of `path` over that of the files in its _BASE_, one or a list, which are named
    from the folder of `path`.

    Raises:
        MissingFileError, InputError: sentences that name the file and the line in it.
    """
    return copy.deepcopy(_Bases().read(path, ()))


class _Bases:
    """Reads files and what they are based on, each once."""

    def __init__(self):
        self.contents = {}

    def read(self, path: str, above: tuple[str, ...]) -> dict:
        """`above` are the files that led to `path`."""
        if _identity(path) in map(_identity, above):
            raise InputError(f"{above[-1]} is based on {path}, which is based on it.")
        if len(above) > _LONGEST_CHAIN:
            raise InputError(f"{above[0]} is based on a chain of more than {_LONGEST_CHAIN} files.")
        if _identity(path) not in self.contents:
            self.contents[_identity(path)] = self._with_bases(path, above)
        return self.contents[_identity(path)]

    def _with_bases(self, path: str, above: tuple[str, ...]) -> dict:
        content = _read_one(path, above[-1] if above else None)
        if _BASE not in content:
            return content
        bases = content.pop(_BASE)
        bases = bases if isinstance(bases, list) else [bases]
        merged = {}
        for base in bases:
            if not isinstance(base, str):
                raise InputError(f"{_BASE} in {path} names no file: {base!r}.")
            below = self.read(_base_path(path, base), (*above, path))
            _merge(copy.deepcopy(below), merged, path)
        _merge(content, merged, path)
        return merged


def _identity(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)


def _base_path(path: str, base: str) -> str:
    base = os.path.expanduser(base)
    is_whole = os.path.isabs(base) or "://" in base
    return base if is_whole else os.path.join(os.path.dirname(path), base)


def _merge(content: dict, under: dict, path: str) -> None:
    """Put `content` over `under`, in place."""
    for key, value in content.items():
        if isinstance(value, dict) and key in under:
            if not isinstance(under[key], dict):
                raise InputError(f"{path} sets keys in {key}, which is a value in its base.")
            _merge(value, under[key], path)
        else:
            under[key] = value


def _read_one(path: str, above: str | None) -> dict:
    text = _decoded(_read_bytes(path, above), path)
    try:
        content = _load(text, path)
    except InputError:
        raise
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not valid YAML: {reason}") from error
    except RecursionError:
        raise InputError(f"{path} is nested too deeply for a config.") from None
    except (ValueError, TypeError, ArithmeticError) as error:  # a date of month 13, a long integer
        reason = " ".join(str(error).split())
        raise InputError(f"{path} holds a value that cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no config keys.")
    return content


def _read_bytes(path: str, above: str | None) -> bytes:
    shown = path if above is None else f"{path!r}, on which {above} is based,"
    file = _fetched(path, shown) if "://" in path else path
    try:
        if os.path.isdir(file):
            raise InputError(f"{shown} is a folder and not a config file.")
        if os.path.exists(file) and not os.path.isfile(file):
            raise InputError(f"{shown} is no regular file.")
        with open(file, "rb") as opened:
            data = opened.read(_LARGEST_FILE + 1)
    except (FileNotFoundError, ValueError) as error:  # a ValueError: the name has a NUL byte
        if isinstance(error, InputError):
            raise
        if above is None:
            raise MissingFileError(f"There is no config file {path!r}.") from error
        raise MissingFileError(f"{above} is based on {path}, which is not there.") from error
    if len(data) > _LARGEST_FILE:
        raise InputError(f"{path} is larger than {_LARGEST_FILE} bytes, which no config is.")
    return data


def _fetched(address: str, shown: str) -> str:
    try:
        return PathManager.get_local_path(address)
    except Exception as error:  # whatever the handler of the address raises
        reason = " ".join(str(error).split())
        raise MissingFileError(f"{shown} could not be fetched: {reason}") from error


def _decoded(data: bytes, path: str) -> str:
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at {error.start}.") from error


def _load(text: str, path: str) -> object:
    loader = _Loader(text)
    loader.name = path
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _size(root, {}) > _MOST_NODES:
            raise InputError(f"{path} has more than {_MOST_NODES} values, which no config has.")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many nodes `node` has once aliases are written out."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in sizes:
        if sizes[id(node)] == 0:  # still being counted
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} contains itself")
        return sizes[id(node)]
    sizes[id(node)] = 0
    parts = node.value
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]


class _Loader(yaml.SafeLoader):
    """Plain data, and the two tags of Python that configs of Detectron2 have."""

    def compose_mapping_node(self, anchor):
        """Of a key that stands there twice, YAML would take the last."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                line = key.start_mark.line + 1
                raise InputError(f"{self.name}, line {line}, sets {key.value} a second time.")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node

    def bounded_int(self, node: yaml.ScalarNode) -> int:
        number = self.construct_yaml_int(node)
        if abs(number) >= _LARGEST_INT:
            line = node.start_mark.line + 1
            raise InputError(f"{self.name}, line {line}, has an integer beyond 2^63.")
        return number

    def python_tuple(self, node: yaml.SequenceNode) -> tuple:
        return tuple(self.construct_sequence(node, deep=True))

    def arithmetic(self, node: yaml.Node) -> object:
        line = node.start_mark.line + 1
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
        if len(parts) != 1 or not isinstance(parts[0], yaml.ScalarNode):
            raise InputError(f"{self.name}, line {line}: {node.tag} takes a list of one text.")
        try:
            return compute(parts[0].value)
        except ValueError as error:
            raise InputError(
                f"{self.name}, line {line}, is refused, and nothing in it was run: {error}."
            ) from error

    def refuse(self, node: yaml.Node) -> None:
        tag = node.tag.replace(_TAG, "!!")
        line = node.start_mark.line + 1
        raise InputError(
            f"{self.name}, line {line}, is refused, and nothing in it was run: the tag {tag} is no "
            "part of a config."
        )


_Loader.add_constructor(f"{_TAG}int", _Loader.bounded_int)
_Loader.add_constructor(f"{_TAG}python/int", _Loader.bounded_int)
_Loader.add_constructor(f"{_TAG}python/tuple", _Loader.python_tuple)
_Loader.add_constructor(f"{_TAG}python/object/apply:eval", _Loader.arithmetic)
for _name, _read in (
    ("none", _Loader.construct_yaml_null),
    ("bool", _Loader.construct_yaml_bool),
    ("str", _Loader.construct_yaml_str),
    ("unicode", _Loader.construct_yaml_str),
    ("float", _Loader.construct_yaml_float),
    ("list", _Loader.construct_yaml_seq),
    ("dict", _Loader.construct_yaml_map),
):
    _Loader.add_constructor(f"{_TAG}python/{_name}", _read)
_Loader.add_constructor(None, _Loader.refuse)
