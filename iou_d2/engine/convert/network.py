"""What a file here says of its network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .layouts import PixelFormat
from .rows import Row


@dataclass(frozen=True)
class Network:
    """The head of a detector; ResNet and FPN are known for all of them.

    Args:
        title: as a user would call it.
        signs: layout -> regular expression of a name that no other network has there; also for
            "detectron2", where it is searched in Detectron2's names.
        rows: layout -> rows of the head, of all layouts but "detectron2".
        pixels: layout -> what its models take, where that is not what ResNets of torchvision do.
        settings: layout -> config keys that its models need, and their values, where neither names
            nor shapes tell.
    """

    title: str
    signs: Mapping[str, str]
    rows: Mapping[str, Callable[[], list[Row]]] = field(default_factory=dict)
    pixels: Mapping[str, PixelFormat] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
