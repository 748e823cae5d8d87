"""From the class scores and qualities of points to the candidates of NMS, as several codes do it.

Checkpoints get the scores that they were published with only by the inference that they were
published with: the codes agree in little but the ranking.

Shape letters: R points of a level, K classes. p is a class score, q the quality of a box.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PointInference:
    """How p and q become scores, and which boxes go on to NMS.

    Args:
        root: whether a score is sqrt(p * q), and not p * q.
        threshold_on_class: whether the score threshold is one of p, and not of the score.
        topk_by_class: whether the best candidates of a level are those of the highest p, and not
            those of the highest score.
        clip: whether boxes are clipped to the image before NMS; else after it.
        drop_empty: whether boxes without area are left out before NMS; else after it.
    """

    root: bool = True
    threshold_on_class: bool = True
    topk_by_class: bool = False
    clip: bool = True
    drop_empty: bool = True

    def score(self, probability: Tensor, quality: Tensor) -> Tensor:
        """p and q -> the score, all of one shape."""
        product = probability * quality
        return product.sqrt() if self.root else product

    def order(self, probability: Tensor, quality: Tensor, threshold: float) -> Tensor:
        """p (R, K) and q (R, 1) -> what candidates are chosen by, (R, K), highest first; 0 where
        one is below the score threshold."""
        score = self.score(probability, quality)
        measured = probability if self.threshold_on_class else score
        return (probability if self.topk_by_class else score) * (measured > threshold)


# MODEL.POINT_DETECTOR.INFERENCE -> the inference of a code.
INFERENCES = {
    # Of FCOS and of ATSS, maskrcnn-benchmark.
    "authors": PointInference(),
    "mmdetection": PointInference(root=False, topk_by_class=True),
    "torchvision": PointInference(threshold_on_class=False, drop_empty=False),
    "detectron2": PointInference(threshold_on_class=False, clip=False, drop_empty=False),
    "adelaidet": PointInference(clip=False, drop_empty=False),
}
