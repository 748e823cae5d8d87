"""Edits of valid files, drawn by Hypothesis: of bytes, and of values in JSON, XML and YAML trees.

A plan is data, so that a try is known by its seed and number. Hypothesis draws plans in batches.
"""

from __future__ import annotations

import copy
import hashlib
import json
import xml.etree.ElementTree as ET
from functools import lru_cache
from typing import Any, NamedTuple

import hypothesis
from hypothesis import strategies as st

BATCH = 50
# Strings that `to_json` and `to_yaml` write as what no value in Python is.
RAW = {
    "@digits": "9" * 5000,
    "@deep": "[" * 100_000 + "]" * 100_000,
    "@infinite": "1e999",
    "@lone": "\\ud800",
}
HOSTILE = (
    *(None, True, False, 0, -0.0, -1, 1, 2, 0.5, 1.0, 7.5, 1e-9, 1e9, 1e15, 1e300, -1e300),
    *(2**31, 2**53 + 1, 2**63, 2**64, 10**30, float("nan"), float("inf"), -float("inf")),
    *("", " ", "0", "1", "8.5", "1.0", "nan", "Infinity", "1e5", "1_000", "true", "\u0661", "x"),
    *("../../etc/passwd", "/etc/passwd", "..\\x.png", "C:\\x\\y.png", "a\0b", "\u202e", "%s{0}"),
    *("x" * 100_000, "é" * 300, *RAW, [], {}, [[]], [None], {"": None}, [1, 2, 3, 4], [0, 0, 0, 0]),
)
_SCALARS = st.one_of(st.integers(), st.floats(), st.text(max_size=12), st.booleans())
VALUES = st.one_of(
    st.sampled_from(HOSTILE),
    _SCALARS,
    st.recursive(
        _SCALARS,
        lambda part: st.lists(part, max_size=5) | st.dictionaries(st.text(max_size=4), part),
        max_leaves=8,
    ),
)
OPERATIONS = ("replace", "replace", "delete", "copy", "twice", "rename", "text", "change", "wrap")


class Edit(NamedTuple):
    operation: str
    place: int
    value: Any
    other: int


class Plan(NamedTuple):
    """`of_values` tells edits of the tree from edits of the bytes; `special` is for each format."""

    of_values: bool
    edits: list[Edit]
    special: int


_EDITS = st.builds(
    Edit,
    st.sampled_from(OPERATIONS),
    st.integers(0, 2**31 - 1),
    VALUES,
    st.integers(0, 2**31 - 1),
)
_PLANS = st.builds(
    Plan,
    st.sampled_from((True, True, True, False)),
    st.lists(_EDITS, min_size=1, max_size=4),
    st.integers(0, 2**31 - 1),
)


def plan(name: str, number: int) -> Plan:
    """The plan of the try `number` of what `name` names."""
    return copy.deepcopy(_batch(name, number // BATCH)[number % BATCH])


@lru_cache(maxsize=1)
def _batch(name: str, batch: int) -> list[Plan]:
    plans: list[Plan] = []
    part = 0
    while len(plans) < BATCH:  # Hypothesis may find fewer than it was asked for
        plans += _drawn(f"{name} {batch} {part}")
        part += 1
    return plans[:BATCH]


def _drawn(name: str) -> list[Plan]:
    found: list[Plan] = []
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=BATCH + 1,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(_PLANS)
    def collect(one: Plan) -> None:
        found.append(one)

    collect()
    return [one for one in found if one != found[0]]  # which is the simplest, always the same


def edit_bytes(data: bytes, edits: list[Edit]) -> bytes:
    """Flip, cut, repeat, move and overwrite bytes."""
    content = bytearray(data)
    for operation, place, value, other in edits:
        at = place % (len(content) + 1)
        length = other % 64
        if operation == "delete":
            del content[at : at + length]
        elif operation == "rename":
            del content[at:]
        elif operation == "twice":
            content[at:at] = content[at : at + 1 + length] * (1 + other % 3)
        elif operation == "copy":
            source = other % (len(content) + 1)
            content[at : at + length] = content[source : source + length]
        elif operation == "text":
            content[at:at] = str(value)[:200].encode("utf-8", "replace")
        elif operation == "wrap":
            content[at : at + 4] = (other * 2654435761 % 2**32).to_bytes(4, "little")
        elif at < len(content):
            content[at] ^= 1 << (other % 8)
    return bytes(content)


def edit_tree(tree: Any, edits: list[Edit]) -> Any:
    """Edit values in nested dicts and lists, which are changed and returned."""
    root = [tree]
    for edit in edits:
        slots = list(_slots(root))
        container, key = slots[edit.place % len(slots)]
        other, other_key = slots[edit.other % len(slots)]
        source = copy.deepcopy(other[other_key])
        _edit_slot(container, key, edit, source)
        if not root:
            return None
    return root[0]


def _slots(container: Any):
    keys = container if isinstance(container, dict) else range(len(container))
    for key in keys:
        yield container, key
        if isinstance(container[key], (dict, list)):
            yield from _slots(container[key])


def _edit_slot(container: Any, key: Any, edit: Edit, source: Any) -> None:
    value = container[key]
    if edit.operation == "delete":
        del container[key]
    elif edit.operation == "copy":
        container[key] = source
    elif edit.operation == "twice" and isinstance(container, list):
        container.insert(key, copy.deepcopy(value))
    elif edit.operation == "twice":
        container[f"{key}@twice"] = edit.value  # see `to_json`
    elif edit.operation == "rename" and isinstance(container, dict):
        container[str(edit.value)[:50]] = container.pop(key)
    elif edit.operation == "text" and not isinstance(value, (dict, list)):
        container[key] = str(value)
    elif edit.operation == "change" and type(value) in (int, float):
        container[key] = _changed_number(value, edit.other)
    elif edit.operation == "wrap":
        container[key] = [value]
    else:
        container[key] = edit.value


def _changed_number(value: float, how: int) -> Any:
    try:
        return (-value, value * 1000, value + 0.5, value + 1, float(value), value / 1000)[how % 6]
    except OverflowError:
        return -value


def to_json(tree: Any) -> bytes:
    """As JSON, with keys that stand twice and with what RAW names."""
    text = json.dumps(tree).replace("@twice", "")
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', f'"{raw}"' if name == "@lone" else raw)
    return text.encode()


def edit_xml(root: ET.Element, edits: list[Edit]) -> ET.Element:
    """Edit elements of a tree, which is changed and returned."""
    for edit in edits:
        parents = {child: parent for parent in root.iter() for child in parent}
        elements = [element for element in root.iter() if element is not root] or [root]
        element = elements[edit.place % len(elements)]
        other = elements[edit.other % len(elements)]
        parent = parents.get(element, root)
        text = RAW.get(edit.value, edit.value) if isinstance(edit.value, str) else edit.value
        if edit.operation == "delete" and element is not root:
            parent.remove(element)
        elif edit.operation == "copy":
            element.append(copy.deepcopy(other))
        elif edit.operation == "twice":
            parent.append(copy.deepcopy(element))
        elif edit.operation == "rename":
            element.tag = other.tag
        elif edit.operation == "wrap":
            element.set("name", str(text)[:100])
        elif edit.operation == "text":
            element.text = f" \n{element.text}\t"
        elif edit.operation == "change":
            element.text = other.text
        else:
            element.text = str(text)
    return root


def to_xml(root: ET.Element) -> bytes:
    return ET.tostring(root, encoding="unicode").encode("utf-8", "surrogatepass")
