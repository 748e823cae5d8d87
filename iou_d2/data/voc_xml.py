"""Reading one Pascal VOC annotation, an XML file in any encoding that it declares."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

from iou_d2.errors import InputError

from .cleaning import Box, Findings
from .coco_values import as_flag

ENCODED = "XML files in another encoding than UTF-8 were read"
TURNED = "boxes that CVAT turned were replaced by the boxes around them"
_MOST_BYTES = 64 * 2**20
_DECLARED = re.compile(rb"""<\?xml[^>]*?encoding\s*=\s*["']([A-Za-z0-9._:-]+)["']""")
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"<\0": "utf-16-le",
    b"\0<": "utf-16-be",
}


class VocObject(NamedTuple):
    name: str
    difficult: int
    box: Box


class VocImage(NamedTuple):
    image_id: str  # the path below the annotations, without its ending
    file_name: str  # as the XML says; the file itself may have another ending
    width: int  # 0 where the XML does not say
    height: int
    objects: list[VocObject]


def parse_xml(xml: Path, findings: Findings) -> ET.Element:
    """The root of an annotation, all tags in lower case.

    Raises InputError with the file's name; entities are refused.
    """
    if xml.stat().st_size > _MOST_BYTES:
        raise InputError(f"{xml} has more than {_MOST_BYTES >> 20} MB, too much for an annotation.")
    text = _decode(xml, findings)
    if "<!ENTITY" in text:
        raise InputError(f"{xml} declares XML entities, which are not read.")
    try:
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise InputError(f"{xml} is not well-formed XML: {error}.") from error
    if root.tag.lower() != "annotation":
        raise InputError(f"{xml} is no VOC annotation: it begins with <{root.tag[:40]}>.")
    for node in root.iter():  # some tools write <Object>
        node.tag = node.tag.lower()
    return root


def _decode(xml: Path, findings: Findings) -> str:
    data = xml.read_bytes()
    marks = (name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark))
    declared = _DECLARED.match(data.lstrip()[:200])
    encoding = next(marks, declared[1].decode().lower() if declared else "utf-8")
    if encoding in ("gb2312", "gbk"):
        encoding = "gb18030"  # holds both, and the characters that programs write beyond them
    try:
        text = data.decode(encoding)
    except (LookupError, UnicodeError) as error:
        how = "declares" if declared else "declares no encoding, so that it should be"
        raise InputError(f"{xml} cannot be decoded: it {how} {encoding} ({error}).") from error
    if encoding not in ("utf-8", "utf8", "utf-8-sig", "us-ascii", "ascii"):
        findings.add(ENCODED, xml.name)
    return text


def object_names(xml: Path, root: ET.Element) -> list[str]:
    return [_text(xml, index, obj, "name") for index, obj in _objects(root)]


def read_image(xml: Path, image_id: str, root: ET.Element, findings: Findings) -> VocImage:
    """What an annotation says of its image; sides that it lacks or that are 0 come back as 0."""
    width, height = (_side(xml, root, side) for side in ("width", "height"))
    objects = []
    for index, obj in _objects(root):
        name = _text(xml, index, obj, "name")
        if obj.find("bndbox") is None:
            raise InputError(f"{xml}: object {index} ({name}) has no bndbox.")
        difficult = _difficult(xml, index, obj)
        box = _read_box(xml, index, obj)
        degrees = _rotation(xml, index, obj)
        if degrees:
            findings.add(TURNED, f"{xml.name}, object {index}")
            box = enclosing_box(box, degrees)
        objects.append(VocObject(name, difficult, box))
    file_name = (root.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
    return VocImage(image_id, file_name, width, height, objects)


def enclosing_box(box: Box, degrees: float) -> Box:
    """The upright box around `box` (XYXY) turned about its centre."""
    x0, y0, x1, y1 = box
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    half_w = ((x1 - x0) * cos + (y1 - y0) * sin) / 2
    half_h = ((x1 - x0) * sin + (y1 - y0) * cos) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - half_w, y - half_h, x + half_w, y + half_h


def _objects(root: ET.Element) -> list[tuple[int, ET.Element]]:
    return list(enumerate(root.findall("object"), start=1))


def _text(xml: Path, index: int, obj: ET.Element, tag: str) -> str:
    text = (obj.findtext(tag) or "").strip()
    if not text:
        raise InputError(f"{xml}: object {index} has no {tag}.")
    return text


def _difficult(xml: Path, index: int, obj: ET.Element) -> int:
    text = (obj.findtext("difficult") or "").strip()
    flag = as_flag(text)
    if flag is None:
        raise InputError(
            f"{xml}: object {index} has the difficult '{text[:40]}', which is neither 0 nor 1."
        )
    return flag


def _side(xml: Path, root: ET.Element, side: str) -> int:
    text = (root.findtext(f"size/{side}") or "").strip() or "0"
    if not re.fullmatch(r"[0-9]{1,9}(\.0+)?", text):
        raise InputError(f"{xml} needs a size in whole pixels, not {side} = '{text[:40]}'.")
    return int(float(text))


def _number(xml: Path, index: int, what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # The comparison fails for NaN and infinity.
    if not -1e12 < value < 1e12:
        raise InputError(f"{xml}: object {index} has the {what} '{text[:40]}', which is no number.")
    return value


def _read_box(xml: Path, index: int, obj: ET.Element) -> Box:
    sides = ("xmin", "ymin", "xmax", "ymax")
    texts = [_text(xml, index, obj, f"bndbox/{side}") for side in sides]
    x0, y0, x1, y1 = (_number(xml, index, *pair) for pair in zip(sides, texts))
    return x0 - 1, y0 - 1, x1, y1


def _rotation(xml: Path, index: int, obj: ET.Element) -> float:
    """Degrees clockwise, as CVAT writes them; 0 where the box is upright."""
    for attribute in obj.findall("attributes/attribute"):
        if (attribute.findtext("name") or "").strip() == "rotation":
            text = (attribute.findtext("value") or "").strip()
            return _number(xml, index, "rotation", text) % 360
    return 0.0
