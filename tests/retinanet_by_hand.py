"""mmdetection's RetinaNet, written from its documentation with nothing of iou_d2 or Detectron2: a
small network with its names, and its anchors, losses and detections by loops over floats.

`extra` is 1 in mmdetection 1, where a box ends with its last pixel, so that it is x2 - x1 + 1 wide,
and 0 since. In a cell, anchors go by ratio and then by scale.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

STRIDES = (8, 16, 32, 64, 128)
CLASSES = 5
THIN = (  # what of our config makes the network as small
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.FPN.OUT_CHANNELS", "64"),
)


class ThinResNet(ResNet):
    """torchvision's ResNet-50 with an eighth of the channels behind the stem."""

    def __init__(self, norm_layer=nn.BatchNorm2d):
        super().__init__(Bottleneck, (3, 4, 6, 3), num_classes=1, norm_layer=norm_layer)
        del self.fc

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


class ConvModule(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs)

    def forward(self, x):
        return self.conv(x)


class MmdetRetinaNet(nn.Module):
    """FPN on c3 to c5, p6 of c5, p7 of p6 without a ReLU; towers of four convolutions."""

    def __init__(self, iou_aware=False, channels=64):
        super().__init__()
        self.iou_aware = iou_aware
        self.backbone, self.neck, self.bbox_head = ThinResNet(), nn.Module(), nn.Module()
        inputs = (64, 128, 256)
        self.neck.lateral_convs = nn.ModuleList(ConvModule(c, channels, 1) for c in inputs)
        extra = [ConvModule(c, channels, 3, 2, 1) for c in (inputs[-1], channels)]
        same = [ConvModule(channels, channels, 3, 1, 1) for _ in inputs]
        self.neck.fpn_convs = nn.ModuleList(same + extra)
        for name in ("cls_convs", "reg_convs"):
            tower = nn.ModuleList(ConvModule(channels, channels, 3, 1, 1) for _ in range(4))
            setattr(self.bbox_head, name, tower)
        self.bbox_head.retina_cls = nn.Conv2d(channels, 9 * CLASSES, 3, 1, 1)
        self.bbox_head.retina_reg = nn.Conv2d(channels, 9 * 4, 3, 1, 1)
        if iou_aware:
            self.bbox_head.retina_iou = nn.Conv2d(channels, 9, 3, 1, 1)

    def features(self, x):
        net = self.backbone
        x = net.layer1(net.maxpool(F.relu(net.bn1(net.conv1(x)))))
        c = [x := layer(x) for layer in (net.layer2, net.layer3, net.layer4)]
        p = [lateral(x) for lateral, x in zip(self.neck.lateral_convs, c)]
        for i in (1, 0):
            p[i] = p[i] + F.interpolate(p[i + 1], size=p[i].shape[2:], mode="nearest")
        convs = self.neck.fpn_convs
        p = [conv(x) for conv, x in zip(convs, p)]
        p6 = convs[3](c[-1])
        return [*p, p6, convs[4](p6)]

    def forward(self, images):
        """(N, 3, H, W) -> the sizes of the levels, and for all anchors class logits (N, R, K),
        deltas (N, R, 4) and IoU logits (N, R, 1) or None."""
        shapes, outputs = [], ([], [], [])
        head = self.bbox_head
        for feature in self.features(images):
            shapes.append(tuple(feature.shape[2:]))
            of_classes, of_boxes = feature, feature
            for cls_conv, reg_conv in zip(head.cls_convs, head.reg_convs):
                of_classes, of_boxes = F.relu(cls_conv(of_classes)), F.relu(reg_conv(of_boxes))
            maps = [head.retina_cls(of_classes), head.retina_reg(of_boxes)]
            if self.iou_aware:
                maps.append(head.retina_iou(of_boxes))
            for found, x, values in zip(outputs, maps, (CLASSES, 4, 1)):
                found.append(x.permute(0, 2, 3, 1).reshape(len(x), -1, values))
        return shapes, *(torch.cat(x, dim=1) if x else None for x in outputs)


def anchors_by_hand(shapes, extra=0):
    """Per level a list of [x1, y1, x2, y2]."""
    levels = []
    for stride, (rows, columns) in zip(STRIDES, shapes):
        base = []
        for ratio in (0.5, 1.0, 2.0):
            for octave in range(3):
                side = 4 * stride * 2 ** (octave / 3)
                w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
                c = extra * (stride - 1) / 2
                box = [c - (w - extra) / 2, c - (h - extra) / 2]
                box += [c + (w - extra) / 2, c + (h - extra) / 2]
                base.append([round(v) for v in box] if extra else box)
        levels.append(
            [
                [b[0] + x * stride, b[1] + y * stride, b[2] + x * stride, b[3] + y * stride]
                for y in range(rows)
                for x in range(columns)
                for b in base
            ]
        )
    return levels


def cells_inside(shapes, image_size):
    """Whether each anchor's cell is one of the image padded to 32, not of the batch's padding."""
    height, width = (math.ceil(side / 32) * 32 for side in image_size)
    return [
        y < math.ceil(height / stride) and x < math.ceil(width / stride)
        for stride, (rows, columns) in zip(STRIDES, shapes)
        for y in range(rows)
        for x in range(columns)
        for _ in range(9)
    ]


def iou_by_hand(a, b, extra=0):
    """Of two boxes of numbers or of scalar tensors."""
    low, high = (lambda p, q: p if p < q else q), (lambda p, q: p if p > q else q)
    w = low(a[2], b[2]) - high(a[0], b[0]) + extra
    h = low(a[3], b[3]) - high(a[1], b[1]) + extra
    inner = high(w, 0.0) * high(h, 0.0)
    area_a, area_b = ((x[2] - x[0] + extra) * (x[3] - x[1] + extra) for x in (a, b))
    return inner / (area_a + area_b - inner)


def assign_by_hand(anchors, objects, inside, extra=0):
    """The object of each anchor, -1 for background, None for none of both."""
    found = [-1 if usable else None for usable in inside]
    if not objects:
        return found
    ious = [[iou_by_hand(a, o, extra) for o in objects] for a in anchors]
    for i, usable in enumerate(inside):
        if usable and max(ious[i]) >= 0.4:
            best = ious[i].index(max(ious[i]))
            found[i] = best if max(ious[i]) >= 0.5 else None
    for o in range(len(objects)):
        best = max(row[o] for row, usable in zip(ious, inside) if usable)
        for i, usable in enumerate(inside):
            if usable and ious[i][o] == best:
                found[i] = o
    return found


def encode_by_hand(anchor, box, extra=0):
    w, h = anchor[2] - anchor[0] + extra, anchor[3] - anchor[1] + extra
    dx = ((box[0] + box[2]) / 2 - (anchor[0] + anchor[2]) / 2) / w
    dy = ((box[1] + box[3]) / 2 - (anchor[1] + anchor[3]) / 2) / h
    dw, dh = math.log((box[2] - box[0] + extra) / w), math.log((box[3] - box[1] + extra) / h)
    return [dx, dy, dw, dh]


def decode_by_hand(anchor, delta, extra=0):
    """Of numbers or of scalar tensors."""
    w, h = anchor[2] - anchor[0] + extra, anchor[3] - anchor[1] + extra
    x, y = (anchor[0] + anchor[2]) / 2 + delta[0] * w, (anchor[1] + anchor[3]) / 2 + delta[1] * h
    exp = torch.exp if torch.is_tensor(delta[2]) else math.exp
    w, h = w * exp(delta[2]), h * exp(delta[3])
    half = extra / 2
    return [x - w / 2 + half, y - h / 2 + half, x + w / 2 - half, y + h / 2 - half]


def losses_by_hand(shapes, logits, deltas, iou_logits, images, beta=0.0, extra=0):
    """Losses of outputs in float64; `images` are (size, boxes, classes), with COCO's corners."""
    anchors = [a for level in anchors_by_hand(shapes, extra) for a in level]
    cls = box = iou_loss = 0.0
    divisor = 0
    for n, (size, boxes, classes) in enumerate(images):
        boxes = [[b[0], b[1], b[2] - extra, b[3] - extra] for b in boxes]
        assigned = assign_by_hand(anchors, boxes, cells_inside(shapes, size), extra)
        positives = [i for i, o in enumerate(assigned) if o is not None and o >= 0]
        divisor += max(len(positives), 1)
        for i, o in enumerate(assigned):
            if o is None:
                continue
            p = logits[n, i].sigmoid()
            target = torch.zeros(CLASSES, dtype=torch.float64)
            if o >= 0:
                target[classes[o]] = 1
            of_true = -0.25 * (1 - p) ** 2 * p.log() * target
            cls = cls + (of_true - 0.75 * p**2 * (1 - p).log() * (1 - target)).sum()
        for i in positives:
            expected = encode_by_hand(anchors[i], boxes[assigned[i]], extra)
            error = (deltas[n, i] - torch.tensor(expected, dtype=torch.float64)).abs()
            if beta:
                error = torch.where(error < beta, error**2 / (2 * beta), error - beta / 2)
            box = box + error.sum()
            if iou_logits is not None:
                predicted = decode_by_hand(anchors[i], deltas[n, i], extra)
                iou = iou_by_hand(predicted, boxes[assigned[i]], extra)
                p = iou_logits[n, i, 0].sigmoid()
                iou_loss = iou_loss - iou * p.log() - (1 - iou) * (1 - p).log()
    losses = {"loss_cls": cls / divisor, "loss_box_reg": box / divisor}
    return losses if iou_logits is None else {**losses, "loss_iou": iou_loss / divisor}


def detections_by_hand(shapes, logits, deltas, iou_logits, size, extra=0):
    """(score, class, box as COCO's corners) of one image, best first: scores over 0.05, NMS over
    0.5 of boxes of one class that are clipped to the image, 100 in all."""
    anchors = [a for level in anchors_by_hand(shapes, extra) for a in level]
    height, width = size
    found = []
    for i, anchor in enumerate(anchors):
        scores = logits[i].sigmoid()
        if iou_logits is not None:
            scores = (scores * iou_logits[i].sigmoid()).sqrt()
        if scores.max() <= 0.05:
            continue
        box = decode_by_hand(anchor, deltas[i].tolist(), extra)
        limits = (width - extra, height - extra) * 2
        box = [min(max(v, 0), limit) for v, limit in zip(box, limits)]
        if box[2] > box[0] and box[3] > box[1]:
            found += [(s, k, box) for k, s in enumerate(scores.tolist()) if s > 0.05]
    kept = []
    for score, k, box in sorted(found, key=lambda x: -x[0]):
        rivals = (other for _, c, other in kept if c == k)
        if not any(iou_by_hand(box, other, extra) > 0.5 for other in rivals):
            kept.append((score, k, box))
            if len(kept) == 100:
                break
    return [(s, k, [b[0], b[1], b[2] + extra, b[3] + extra]) for s, k, b in kept]
