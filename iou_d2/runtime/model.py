"""What every exported model needs: ONNX Runtime's session, and images as it takes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from iou_d2.errors import InputError, MissingFileError

from .description import Description
from .resize import resize

# What ONNX Runtime calls the types of inputs.
TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


class ImageModel:
    """A model that `iou-d2 export` wrote, for one image at a time.

    Attributes:
        description: what the file says of itself: class names, sizes, method.
        session: ONNX Runtime's, for whoever wants more.
    """

    # What `--with` has to have been, and what is wrong with anything else.
    outputs: str
    fault: str

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        """
        Args:
            path: the .onnx file.
            threads: of the CPU, for one image; None lets ONNX Runtime choose.
            providers: ONNX Runtime's names of where to run, the first that can run a node does.

        Raises:
            InputError: the file is not there, is no ONNX, or is no such model, or a provider is not
                there.
        """
        path = os.fspath(path)
        self.session = _session(path, threads, list(providers))
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.description = Description.from_metadata(metadata, path)
        if self.description.outputs != self.outputs:
            raise InputError(
                f"{path} puts out {self.description.outputs}, {self.fault}: export it with "
                f"`--with {self.outputs}`."
            )
        images = self.session.get_inputs()[0]
        if images.type not in TYPES:
            raise InputError(
                f"{path} takes {images.type}, which `iou-d2 export` does not write: images are "
                f"{' or '.join(TYPES)}."
            )
        self.dtype = TYPES[images.type]
        batch, _, *size = images.shape
        if isinstance(batch, int) and batch != 1:
            raise InputError(f"{path} takes {batch} images at once: export it with --batch 1.")
        # (height, width) of a model for one size; None where it takes any.
        self.size = tuple(size) if all(isinstance(side, int) for side in size) else None

    def prepare(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 BGR -> the input of the model (1, 3, h, w), and by what x and y of boxes
        in it are multiplied for those in the image, (4,). Raises InputError for something else."""
        _require_image(image)
        height, width = self._size_of(*image.shape[:2])
        pixels = resize(np.ascontiguousarray(image), (height, width))
        scale = np.array([image.shape[1] / width, image.shape[0] / height], dtype=np.float32)
        return self._batch(pixels), np.tile(scale, 2)

    def run(self, scale: np.ndarray, shape: tuple[int, ...], **inputs: np.ndarray) -> dict:
        """The detections of an image of a `shape`, whose `scale` is that of `prepare`."""
        outputs = self.session.run(None, inputs)
        names = [output.name for output in self.session.get_outputs()]
        found = {name: value[0] for name, value in zip(names, outputs)}
        count = found.pop("counts")
        found = {name: value[:count] for name, value in found.items()}
        found["boxes"] = clip(found["boxes"] * scale, *shape[:2])
        # As Detectron2 does: what lay in the padding is no detection.
        there = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(axis=1)
        return {name: value[there] for name, value in found.items()}

    def _size_of(self, height: int, width: int) -> tuple[int, int]:
        """What an image is scaled to: as the description says, and into the size of a model for
        one."""
        new_height, new_width = self.description.resize.size_of(height, width)
        if self.size is None or (new_height <= self.size[0] and new_width <= self.size[1]):
            return new_height, new_width
        scale = min(self.size[0] / height, self.size[1] / width)
        return max(1, int(height * scale)), max(1, int(width * scale))

    def _batch(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) BGR -> the input of the model, (1, 3, H, W)."""
        if self.description.pixel_order == "RGB":
            pixels = pixels[:, :, ::-1]
        if self.size is None:
            batch = pixels
        else:
            mean = np.array(self.description.pixel_mean)
            batch = np.empty((*self.size, 3), dtype=self.dtype)
            batch[:] = mean.round() if self.dtype == np.uint8 else mean
            batch[: pixels.shape[0], : pixels.shape[1]] = pixels
        return np.ascontiguousarray(batch.transpose(2, 0, 1)[None], dtype=self.dtype)


def _session(path: str, threads: int | None, providers: list[str]) -> onnxruntime.InferenceSession:
    if not Path(path).is_file():
        raise MissingFileError(f"There is no model {path}.")
    available = onnxruntime.get_available_providers()
    missing = [name for name in providers if name not in available]
    if missing or not providers:
        raise InputError(
            f"This ONNX Runtime has no provider {', '.join(missing) or 'of no name'}, only "
            f"{', '.join(available)}."
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads is not None:
        if threads < 1:
            raise InputError(f"A model runs on at least 1 thread, not on {threads}.")
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # of a dozen types, all of pybind11 and none a base of the others
        raise InputError(f"ONNX Runtime cannot load {path}: {error}") from error


def _require_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        got = (
            f"{image.dtype} {image.shape}"
            if isinstance(image, np.ndarray)
            else type(image).__name__
        )
        raise InputError(f"An image is (H, W, 3) uint8 BGR, as OpenCV reads it, but got {got}.")
    if 0 in image.shape:
        raise InputError(f"The image has no pixels: its shape is {image.shape}.")


def clip(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    return boxes.clip(0, np.array([width, height] * 2, dtype=boxes.dtype))
