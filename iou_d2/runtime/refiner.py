"""An exported IoU-Net that ranks and moves the detections of any detector."""

from __future__ import annotations

import numpy as np

from iou_d2.errors import InputError

from .model import ImageModel, clip


class Refiner(ImageModel):
    """A model that `iou-d2 export` wrote with `--with refinement`."""

    outputs = "refinement"
    fault = "of images alone"

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The detections that IoU-Net's NMS leaves, where it moves them, best first.

        Args:
            image: (H, W, 3) uint8 BGR, as OpenCV reads it.
            boxes: (R, 4) XYXY in pixels of the image, of a detector before its NMS; R may be 0.
            classes: (R,) whole numbers, by `description.class_names`.
            scores: (R,) class scores in [0, 1]. Those at most the threshold that the model was
                exported with are left out.

        Returns:
            "boxes" (D, 4), "scores", "cls_scores", "pred_ious" (D,) and "classes" (D,) int64. D
            may be 0.

        Raises:
            InputError: something else, or a class that the model does not know.
        """
        boxes, classes, scores = (np.asarray(x) for x in (boxes, classes, scores))
        self._require_detections(boxes, classes, scores)
        pixels, scale = self.prepare(image)
        boxes = clip(boxes.astype(np.float32), *image.shape[:2]) / scale
        return self.run(
            scale,
            image.shape,
            images=pixels,
            given_boxes=boxes[None],
            given_scores=scores.astype(np.float32)[None],
            given_classes=classes.astype(np.int64)[None],
        )

    def _require_detections(
        self, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray
    ) -> None:
        shapes = boxes.shape, classes.shape, scores.shape
        if shapes != ((len(boxes), 4), (len(boxes),), (len(boxes),)):
            raise InputError(
                "Boxes are (R, 4), classes and scores (R,), not "
                f"{', '.join(str(shape) for shape in shapes)}."
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise InputError("There are boxes or scores that are no finite numbers.")
        count = len(self.description.class_names)
        wrong = (classes != np.floor(classes)) | (classes < 0)
        if count:
            wrong |= classes >= count
        if wrong.any():
            raise InputError(
                f"Class {classes[wrong][0]} is none of this model, which knows those of 0 to "
                f"{count - 1 if count else 'K - 1'}."
            )
