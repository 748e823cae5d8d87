"""A detector, what it says of a batch, and which points learn an object."""

from __future__ import annotations

import torch

from iou_d2.engine.oracle import editor_of


class Scene:
    """
    Args:
        model: in test mode.
        batch: Detectron2's standard input, with "instances".
        change: of the predictions and the editor, before anything looks at them.
    """

    def __init__(self, model, batch, change=lambda predictions, editor: predictions):
        self.model = model
        self.batch = batch
        self.truth = [x["instances"] for x in batch]
        self.editor = editor_of(model)
        self.images = self.editor.preprocess(batch)
        with torch.no_grad():
            self.predictions = change(self.editor.predict(self.images), self.editor)
        self.foreground = self.editor.foreground(
            self.predictions, self.images.image_sizes, self.truth
        )

    def apply(self, *oracles):
        predictions = self.predictions
        for oracle in oracles:
            predictions = oracle(self.editor, predictions, self.foreground)
        return predictions

    def detect(self, predictions):
        with torch.no_grad():
            return self.editor.detect(predictions, self.images.image_sizes)
