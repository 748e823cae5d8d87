"""JSON that is read in pieces gives what Python's parser gives, or its error."""

from __future__ import annotations

import json
import random

import pytest

from iou_d2.data import json_file
from iou_d2.data.json_file import parse_json
from iou_d2.data.packed_list import PackedArray, PackedList
from iou_d2.errors import InputError

NASTY = [
    {"a": "}, {", "b": [{"c": 1}, {"c": 2}], "d": 1e400, "e": "\u00e9\ud800", "f": 2**70},
    {"x": {"y": {}, "z": [{}, {}]}, '"}, {"': "\\"},
    {},
    [],
    5,
    "}, {",
    None,
    [{"a": 1}, {"a": 2}],
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(json_file, "_PIECE", 20)


def unpacked(content):
    if not isinstance(content, dict):
        return content
    return {k: list(v) if isinstance(v, PackedList) else v for k, v in content.items()}


def test_pieces_equal_the_whole(tmp_path):
    rng = random.Random(0)
    file = tmp_path / "a.json"
    for _ in range(300):
        values = rng.choices(NASTY, k=rng.randrange(12))
        other = {"before": [{"k": values[:2]}, {}], "after": [{"annotations": [{}, {}]}, {}]}
        content = {"before": other["before"], "annotations": values, "after": other["after"]}
        indent, ends = (
            rng.choice([None, 0, 1]),
            rng.choice([(",", ":"), (", ", ": "), (" , ", " : ")]),
        )
        file.write_text(
            rng.choice(["", " \n"]) + json.dumps(content, indent=indent, separators=ends)
        )
        found, _ = parse_json(file, packed="annotations")
        assert isinstance(found["annotations"], PackedList)
        assert unpacked(found) == content and list(found) == list(content)


def test_broken_text_gives_the_same_sentence(tmp_path):
    rng = random.Random(0)
    file = tmp_path / "a.json"
    whole = json.dumps({"images": [], "annotations": NASTY, "z": [{}, {}]})
    for _ in range(1000):
        at = rng.randrange(len(whole))
        cut = (
            whole[:at]
            + rng.choice(["", "x", ",", "]", "}", '"', " "])
            + whole[at + rng.randrange(2) :]
        )
        file.write_text(rng.choice([cut, cut, whole[:at]]))
        answers = []
        for packed in (None, "annotations"):
            try:
                answers.append(unpacked(parse_json(file, packed=packed)[0]))
            except InputError as error:
                answers.append(str(error))
        assert answers[0] == answers[1]


@pytest.mark.parametrize("text", ["[]", "5", '"a"', "null", '{"annotations": 5}', "{}"])
def test_what_is_no_dict_with_that_list(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert parse_json(tmp_path / "a.json", packed="annotations")[0] == json.loads(text)


@pytest.mark.parametrize("where", [0, 7, 39])
def test_a_key_given_twice_is_found_in_every_piece(tmp_path, where):
    values = ['{"id": 1, "b": 2}'] * 40
    values[where] = '{"id": 1, "id": 2}'
    (tmp_path / "a.json").write_text(f'{{"annotations": [{", ".join(values)}]}}')
    with pytest.raises(InputError, match="key 'id' twice"):
        parse_json(tmp_path / "a.json", packed="annotations")


def test_packed_list():
    packed = PackedList(range(10_000))
    packed.extend([{"a": [1, 2.5]}])
    assert len(packed) == 10_001 and list(packed) == [*range(10_000), {"a": [1, 2.5]}]
    even = packed.change(lambda piece: [v for v in piece if isinstance(v, int) and v % 2 == 0])
    assert list(even) == list(range(0, 10_000, 2)) and len(packed) == 10_001
    assert list(even.change(lambda piece: piece)) == list(even)
    assert list(even.drain()) == list(range(0, 10_000, 2)) and list(even) == [] and len(even) == 0
    assert list(PackedList()) == []


def test_packed_array():
    values = [{"a": [1, 2.5]}, "b", None, {}]
    array = PackedArray(values)
    assert [array[i] for i in range(len(array))] == values and len(PackedArray([])) == 0
