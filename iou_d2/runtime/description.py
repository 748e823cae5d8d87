"""What an exported file says of itself, in the metadata that every reader of ONNX shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from iou_d2.errors import InputError

# Before each key, and in it what is written of how files are to be read.
PREFIX = "iou_d2."
FORMAT = 1


@dataclass(frozen=True)
class ShortestEdge:
    """Images are scaled until their shorter side is `shortest_edge` pixels, or less where the
    longer one would exceed `longest_edge`: Detectron2's rule. A shortest edge of 0 scales none."""

    shortest_edge: int
    longest_edge: int

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a scaled image, rounded as Detectron2 rounds them; at least 1."""
        if self.shortest_edge == 0:
            return height, width
        scale = self.shortest_edge / min(height, width)
        if height < width:
            height, width = self.shortest_edge, scale * width
        else:
            height, width = scale * height, self.shortest_edge
        if max(height, width) > self.longest_edge:
            scale = self.longest_edge / max(height, width)
            height, width = height * scale, width * scale
        return max(1, int(height + 0.5)), max(1, int(width + 0.5))


@dataclass(frozen=True)
class Square:
    """Images become squares of `side` pixels, whatever their shape."""

    side: int

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a scaled image."""
        return self.side, self.side


Resize = ShortestEdge | Square
# Which it is, the names of its numbers say.
RESIZES = {frozenset(field.name for field in fields(kind)): kind for kind in (ShortestEdge, Square)}


@dataclass(frozen=True)
class Description:
    """
    Args:
        method: the META_ARCHITECTURE of the config.
        class_names: in the order of the class numbers; empty where the model knows none.
        pixel_order: "BGR" or "RGB", what the channels of the input are.
        pixel_mean: of these channels; what an image may be padded with.
        size_divisibility: height and width are padded to multiples of it, in the graph.
        resize: what images were scaled to before the model saw them.
        outputs: "raw", "candidates", "detections" or "refinement".
        score: what `scores` are.
        version: of the iou_d2 that wrote the file.
        weights_sha256: of the file of the weights; empty where there was none.
    """

    method: str
    class_names: list[str]
    pixel_order: str
    pixel_mean: list[float]
    size_divisibility: int
    resize: Resize
    outputs: str
    score: str
    version: str
    weights_sha256: str

    def to_metadata(self) -> dict[str, str]:
        """Names and values, which are JSON where they are no text."""
        values = {"format": FORMAT, **asdict(self)}
        return {
            PREFIX + name: value if isinstance(value, str) else json.dumps(value)
            for name, value in values.items()
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], file: str) -> Description:
        """The inverse. Raises InputError with the name of `file` where a key is not there or is not
        what this version writes."""
        if PREFIX + "format" not in metadata:
            raise InputError(
                f"{file} does not say how images are given to it, so it is none of `iou-d2 export`."
            )
        if metadata[PREFIX + "format"] != str(FORMAT):
            raise InputError(
                f"{file} is of the format {metadata[PREFIX + 'format']}, but this version of "
                f"iou_d2 reads {FORMAT}: use the iou_d2 that wrote it, or a newer one."
            )
        try:
            values = {
                field.name: _read(metadata[PREFIX + field.name], field.type)
                for field in fields(cls)
            }
            resize = RESIZES[frozenset(values["resize"])](**values["resize"])
            return cls(**{**values, "resize": resize})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"The metadata of {file} were changed since it was exported: "
                f"{type(error).__name__}, {error}."
            ) from error

    def class_name(self, index: int) -> str:
        return self.class_names[index] if self.class_names else f"class {index}"


def _read(text: str, kind: str):
    return text if kind == "str" else json.loads(text)
