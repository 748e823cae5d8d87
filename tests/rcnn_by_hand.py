"""Faster, Mask and Cascade R-CNN of mmdetection 3.3 at test time, in float64 from its state dict.

One image. C channels, K classes, R proposals. Only convolutions, matrix products and RoIAlign are
PyTorch's and torchvision's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

STRIDES = (4, 8, 16, 32, 64)
RPN_STDS = (1.0, 1.0, 1.0, 1.0)
STAGE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


class MMDetRCNN:
    def __init__(
        self,
        state: dict[str, Tensor],
        features: list[Tensor],
        size: tuple[int, int],
        most_proposals: int = 1000,
    ):
        """`features`: 5 maps (1, C, H, W). `size`: (height, width) of the image."""
        self.state = {name: x.double() for name, x in state.items()}
        self.features = [x.double() for x in features]
        self.size = size
        self.most_proposals = most_proposals
        cascade = "roi_head.bbox_head.0.fc_cls.weight" in state
        self.stages = [f".{i}" for i in range(3)] if cascade else [""]

    def layer(self, name: str, x: Tensor, padding: int = 0) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        if weight.ndim == 2:
            return x @ weight.T + bias
        return F.conv2d(x, weight, bias, padding=padding)

    def proposals(self) -> Tensor:
        """(R, 4): the best 1000 of each level, NMS at 0.7 within a level, the best of all."""
        boxes, scores = [], []
        for feature, stride in zip(self.features, STRIDES):
            hidden = self.layer("rpn_head.rpn_conv", feature, padding=1).relu()
            score = self.layer("rpn_head.rpn_cls", hidden)[0].sigmoid()  # (3, H, W)
            deltas = self.layer("rpn_head.rpn_reg", hidden)[0]
            found = []
            for row in range(score.shape[1]):
                for column in range(score.shape[2]):
                    for index, ratio in enumerate((0.5, 1.0, 2.0)):
                        width, height = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
                        x, y = column * stride, row * stride
                        anchor = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                        delta = deltas[4 * index : 4 * index + 4, row, column]
                        found.append((anchor, delta, score[index, row, column]))
            anchors = torch.tensor([x[0] for x in found], dtype=torch.float64)
            level_scores = torch.stack([x[2] for x in found])
            level_boxes = self.decode(anchors, torch.stack([x[1] for x in found]), RPN_STDS)
            best = level_scores.argsort(descending=True)[:1000]
            best = best[(level_boxes[best, 2:] > level_boxes[best, :2]).all(dim=1)]
            best = best[nms(level_boxes[best], level_scores[best], 0.7)]
            boxes.append(level_boxes[best])
            scores.append(level_scores[best])
        best = torch.cat(scores).argsort(descending=True)[: self.most_proposals]
        return torch.cat(boxes)[best]

    def decode(self, boxes: Tensor, deltas: Tensor, stds: tuple) -> Tensor:
        """Boxes (R, 4) and deltas (R, 4) -> boxes (R, 4) that end at the border of the image."""
        dx, dy, dw, dh = (deltas * deltas.new_tensor(stds)).unbind(dim=1)
        limit = abs(math.log(16 / 1000))
        dw, dh = dw.clamp(-limit, limit), dh.clamp(-limit, limit)
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
        w, h = (x2 - x1) * dw.exp(), (y2 - y1) * dh.exp()
        height, width = self.size
        across = [(x - w / 2).clamp(0, width), (x + w / 2).clamp(0, width)]
        down = [(y - h / 2).clamp(0, height), (y + h / 2).clamp(0, height)]
        return torch.stack([across[0], down[0], across[1], down[1]], dim=1)

    def pool(self, boxes: Tensor, side: int) -> Tensor:
        """(R, 4) -> (R, C, side, side)."""
        pooled = []
        for box in boxes:
            level = level_of(box)
            where = [box[None]], side, 1 / STRIDES[level]
            pooled.append(roi_align(self.features[level], *where, sampling_ratio=-1, aligned=True))
        return torch.cat(pooled)

    def box_head(self, stage: str, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1) and deltas (R, 4 or 4K)."""
        name = f"roi_head.bbox_head{stage}"
        x = self.pool(boxes, 7).flatten(1)
        for index in (0, 1):
            x = self.layer(f"{name}.shared_fcs.{index}", x).relu()
        return self.layer(f"{name}.fc_cls", x), self.layer(f"{name}.fc_reg", x)

    def logits(self) -> list[Tensor]:
        """Of each stage."""
        return self.boxes_and_logits()[1]

    def boxes_and_logits(self) -> tuple[Tensor, list[Tensor]]:
        """Boxes (R, 1 or K, 4) and the logits of each stage."""
        boxes, all_logits = self.proposals(), []
        for stage, stds in zip(self.stages, STAGE_STDS):
            logits, deltas = self.box_head(stage, boxes)
            all_logits.append(logits)
            rows = deltas.shape[1] // 4
            decoded = [self.decode(boxes, deltas[:, 4 * k : 4 * k + 4], stds) for k in range(rows)]
            boxes = decoded[0]
        return torch.stack(decoded, dim=1), all_logits

    def detect(self) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and classes of the best 100 over 0.05, NMS at 0.5 within a class."""
        boxes, logits = self.boxes_and_logits()
        scores = (sum(logits) / len(logits)).softmax(dim=1)[:, :-1]
        found = []
        for k in range(scores.shape[1]):
            over = scores[:, k] > 0.05
            mine, score = boxes[over, min(k, boxes.shape[1] - 1)], scores[over, k]
            found += [(mine[i], score[i], k) for i in nms(mine, score, 0.5)]
        found = sorted(found, key=lambda x: -x[1].item())[:100]
        boxes, scores, classes = zip(*found)
        return torch.stack(boxes).float(), torch.stack(scores).float(), torch.tensor(classes)

    def masks(self, boxes: Tensor, classes: Tensor) -> Tensor:
        """(S, 28, 28): the mean of the probabilities of all mask heads, for boxes (S, 4)."""
        pooled, means = self.pool(boxes.double(), 14), []
        for stage in self.stages:
            name = f"roi_head.mask_head{stage}"
            x = pooled
            for index in range(4):
                x = self.layer(f"{name}.convs.{index}.conv", x, padding=1).relu()
            up = self.state[f"{name}.upsample.weight"], self.state[f"{name}.upsample.bias"]
            x = self.layer(f"{name}.conv_logits", F.conv_transpose2d(x, *up, stride=2).relu())
            means.append(x[torch.arange(len(x)), classes].sigmoid())
        return (sum(means) / len(means)).float()


def level_of(box: Tensor) -> int:
    """The index of the feature map that a box (4,) is pooled from."""
    scale = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    return min(max(math.floor(math.log2(scale / 56 + 1e-6)), 0), 3)


def overlaps(one: Tensor, other: Tensor) -> float:
    """The IoU of two boxes (4,)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    inner = max(width, 0) * max(height, 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (one, other)]
    return float(inner / (sum(areas) - inner))


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """The indices that stay, best first."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left, kept = scores.argsort(descending=True).tolist(), []
    while left:
        best, *rest = left
        kept.append(best)
        rest = torch.tensor(rest, dtype=torch.int64)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        inner = (high - low).clamp(min=0).prod(dim=1)
        left = rest[inner / (area[best] + area[rest] - inner) <= threshold].tolist()
    return kept
