"""VarifocalNet in FCOS mode (use_atss=False) in float64 from the names of mmdetection's tensors,
after its documentation. Run as a script, it writes golden/vfnet_fcos.pt anew."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

from fcos_by_hand import STRIDES, Variant, corners, overlap, suppress, target

GOLDEN = "tests/golden/vfnet_fcos.pt"
DENOMINATORS = (64, 128, 256, 512, 1024)
CHANNELS, GROUPS, CLASSES = 8, 4, 5
HEIGHT, WIDTH = 192, 256


def conv_module(state: dict, name: str, x):
    x = F.conv2d(x, state[f"{name}.conv.weight"], padding=1)
    x = F.group_norm(x, GROUPS, state[f"{name}.gn.weight"], state[f"{name}.gn.bias"])
    return F.relu(x)


def conv(state: dict, name: str, x):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)


def star_offset(box, stride: int):
    """(dy, dx) of the nine points of a box, less those of a plain 3x3 kernel."""
    box = (0.9 * box.detach() + 0.1 * box) / stride
    left, top, right, bottom = box.unbind(1)
    zero = torch.zeros_like(left)
    offsets = []
    for dy, row in ((-top, -1), (zero, 0), (bottom, 1)):
        for dx, column in ((-left, -1), (zero, 0), (right, 1)):
            offsets += [dy - row, dx - column]
    return torch.stack(offsets, 1)


def outputs(state: dict, features: list):
    """(class logits (N, R, K), initial and refined distances (N, R, 4), points, levels)."""
    state = {name.removeprefix("bbox_head."): x for name, x in state.items()}
    found, points, levels = ([], [], []), [], []
    for level, (feature, stride) in enumerate(zip(features, STRIDES)):
        cls = box = feature
        for index in range(3):
            cls = conv_module(state, f"cls_convs.{index}", cls)
            box = conv_module(state, f"reg_convs.{index}", box)
        raw = conv(state, "vfnet_reg", conv_module(state, "vfnet_reg_conv", box))
        first = (state[f"scales.{level}.scale"] * raw).exp() * DENOMINATORS[level]
        offset = star_offset(first, stride)
        seen = [
            F.relu(deform_conv2d(x, offset, state[f"{name}.weight"], padding=1))
            for x, name in ((box, "vfnet_reg_refine_dconv"), (cls, "vfnet_cls_dconv"))
        ]
        raw = state[f"scales_refine.{level}.scale"] * conv(state, "vfnet_reg_refine", seen[0])
        refined = raw.exp() * first.detach()
        for list_, x in zip(found, (conv(state, "vfnet_cls", seen[1]), first, refined)):
            list_.append(x.flatten(2).transpose(1, 2))
        height, width = feature.shape[2:]
        grid = [(x, y) for y in range(height) for x in range(width)]
        points += [(x * stride + stride // 2, y * stride + stride // 2) for x, y in grid]
        levels += [level] * (height * width)
    return (*(torch.cat(x, 1) for x in found), points, levels)


def losses(predictions, truth: list[tuple[list, list]]) -> dict:
    logits, first, refined, points, levels = predictions
    quality = torch.zeros_like(logits)
    sums, weights, positives = [0, 0], [0, 0], 0
    for image, (boxes, classes) in enumerate(truth):
        for index, (point, level) in enumerate(zip(points, levels)):
            match = target(point, level, boxes, Variant())
            if match < 0:
                continue
            positives += 1
            for stage, distances in enumerate((first, refined)):
                iou, giou = overlap(corners(point, distances[image, index]), boxes[match])
                weight = max(iou.item(), 1e-6)
                sums[stage] = sums[stage] + weight * (1 - giou)
                weights[stage] += weight
            quality[image, index, classes[match]] = weight
    p = logits.sigmoid()
    entropy = -(quality * p.log() + (1 - quality) * (1 - p).log())
    varifocal = torch.where(quality > 0, quality, 0.75 * p**2) * entropy
    return {
        "loss_cls": varifocal.sum() / positives,
        "loss_bbox": 1.5 * sums[0] / max(weights[0], 1),
        "loss_bbox_rf": 2 * sums[1] / max(weights[1], 1),
    }


def detections(predictions) -> list[dict]:
    logits, _, refined, points, levels = predictions
    results = []
    for image, scores in enumerate(logits.sigmoid().tolist()):
        candidates = []
        for level in range(5):
            found = [
                (corners(points[i], refined[image, i].tolist()), p, k)
                for i in range(len(points))
                if levels[i] == level
                for k, p in enumerate(scores[i])
                if p > 0.05
            ]
            candidates += sorted(found, key=lambda x: -x[1])[:1000]
        clipped = [
            ([min(max(c, 0), (WIDTH, HEIGHT)[i % 2]) for i, c in enumerate(box)], p, k)
            for box, p, k in candidates
        ]
        kept = suppress(clipped, 0.6)[:100]
        boxes, scores_of, labels = zip(*kept)
        results.append(
            {
                "boxes": torch.tensor(boxes),
                "scores": torch.tensor(scores_of),
                "labels": torch.tensor(labels),
            }
        )
    return results


def random_state(generator) -> dict:
    """Every name of mmdetection's VFNetHead, by hand, with random numbers."""

    def rand(*shape):
        return torch.rand(*shape, generator=generator) - 0.5

    state = {}
    towers = [f"{x}_convs.{i}" for x in ("cls", "reg") for i in range(3)]
    for name in (*towers, "vfnet_reg_conv"):
        state[f"{name}.conv.weight"] = rand(CHANNELS, CHANNELS, 3, 3)
        state[f"{name}.gn.weight"], state[f"{name}.gn.bias"] = rand(CHANNELS) + 1, rand(CHANNELS)
    for name, count in (("vfnet_reg", 4), ("vfnet_reg_refine", 4), ("vfnet_cls", CLASSES)):
        state[f"{name}.weight"] = rand(count, CHANNELS, 3, 3) * 0.3
        state[f"{name}.bias"] = rand(count)
    for name in ("vfnet_reg_refine_dconv", "vfnet_cls_dconv"):
        state[f"{name}.weight"] = rand(CHANNELS, CHANNELS, 3, 3)
    for name in ("scales", "scales_refine"):
        state |= {f"{name}.{level}.scale": rand(1)[0] + 1 for level in range(5)}
    state["vfnet_reg.bias"] -= 1
    state["vfnet_cls.bias"] -= 1
    return {f"bbox_head.{name}": x for name, x in state.items()}


def make() -> dict:
    """The golden file: inputs in float32, what follows from them."""
    generator = torch.Generator().manual_seed(0)
    state = random_state(generator)
    sides = [(-(-HEIGHT // s), -(-WIDTH // s)) for s in STRIDES]
    features = [torch.randn(2, CHANNELS, *side, generator=generator) for side in sides]
    corner = torch.rand(2, 5, 2, generator=generator) * 90
    size = 12 + torch.rand(2, 5, 2, generator=generator) * 85
    boxes = torch.cat([corner, corner + size], dim=2)
    labels = torch.randint(CLASSES, (2, 5), generator=generator)
    double = {name: x.double().requires_grad_() for name, x in state.items()}
    predictions = outputs(double, [x.double() for x in features])
    found = losses(predictions, list(zip(boxes.tolist(), labels.tolist())))
    sum(found.values()).backward()
    predictions = [x.detach() if torch.is_tensor(x) else x for x in predictions]
    return {
        "state_dict": state,
        "features": features,
        "gt_boxes": boxes,
        "gt_labels": labels,
        "losses": {name: x.item() for name, x in found.items()},
        "grads": {name: x.grad.float() for name, x in double.items()},
        "detections": detections(predictions),
    }


if __name__ == "__main__":
    torch.save(make(), GOLDEN)
