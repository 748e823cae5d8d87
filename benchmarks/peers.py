"""Detectors of iou_d2 beside the same ones of torchvision and mmdetection, in turn, in one process.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/peers.py [NAME ...] [--size HxW]
        [--batch N] [--rounds N] [--library torchvision mmdetection] [--precision bfloat16]
        [--device cpu|cuda]

NAME is a detector, such as "RetinaNet"; without one all take part. Prints the median seconds of a
training step (forward, backward, SGD) and of the inference of an image, and the median, lowest and
highest ratio of a round, ours to theirs. SSD300 always sees 300 pixels.

Equal are the threads, the pixels and objects, the classes, the random weights, which are the
peer's, what is frozen (stem, res2 and batch norm of a ResNet-50; nothing of SSD's VGG-16), and the
rules of assignment, loss, proposals and NMS: our configs are those of the peer's weights. Masks are
bitmaps for both. Images need no resizing; for torchvision they are made floats beforehand.

mmdetection needs mmcv with compiled operators, of which there are no wheels for new versions of
torch. Without it a sentence stands in the place of its rows. Beside the packages of this
environment, in which it changes nothing; mmcv 2.1.0 compiles as it is with torch 2.11 on the CPU,
77 files, and its setup.py needs the pkg_resources of setuptools before 81:

    pip install --target ../mmdet --no-deps mmdet==3.3.0 mmengine==0.10.7 addict yapf \\
        platformdirs shapely six terminaltables rich markdown-it-py mdurl pygments
    FORCE_CUDA=0 MMCV_WITH_OPS=1 MAX_JOBS=2 pip install --target ../mmdet --no-deps \\
        --no-build-isolation --no-binary mmcv mmcv==2.1.0
    PYTHONPATH=../mmdet python benchmarks/peers.py --library mmdetection
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.structures import BitMasks
from tabulate import tabulate
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from adapters import (
    MMDetDetector,
    TorchvisionDetector,
    build_mmdet,
    copy_weights,
    inference_in_turn,
    mmdet_batch,
    mmdet_config,
    torchvision_batch,
    training_in_turn,
)
from common import add_device, build, machine, random_batch
from ssd import build_pair

CLASSES = 80
SSD_SIDE = 300
Size = tuple[int, int]  # height, width


class Pair(NamedTuple):
    """A detector, and where both have it."""

    name: str
    # Our config, or the config of mmdetection.
    config: str
    build_peer: Callable[[Size], TorchvisionDetector | MMDetDetector]
    # Of our config.
    classes: int = CLASSES


def torchvision_backbone(first_level: int) -> BackboneWithFPN:
    """A ResNet-50 with an FPN from res`first_level` on, of random weights."""
    extra = {"extra_blocks": LastLevelP6P7(256, 256)} if first_level == 3 else {}
    return resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        trainable_layers=3,
        returned_layers=list(range(first_level - 1, 5)),
        **extra,
    )


def torchvision_peer(detector: type, first_level: int, classes: int) -> Callable:
    def build_peer(size: Size) -> TorchvisionDetector:
        sides = {"min_size": min(size), "max_size": max(size)}
        return TorchvisionDetector(detector(torchvision_backbone(first_level), classes, **sides))

    return build_peer


def mmdet_peer(config: str) -> Callable:
    return lambda size: build_mmdet(mmdet_config(config))


# torchvision's dense detectors have a class for each id, here 0 to 80.
TORCHVISION = (
    Pair(
        *("RetinaNet", "configs/torchvision/retinanet_R_50_FPN.yaml"),
        *(torchvision_peer(RetinaNet, 3, CLASSES + 1), CLASSES + 1),
    ),
    Pair(
        *("FCOS", "configs/torchvision/fcos_R_50_FPN.yaml"),
        *(torchvision_peer(FCOS, 3, CLASSES + 1), CLASSES + 1),
    ),
    Pair(
        *("Faster R-CNN", "configs/torchvision/faster_rcnn_R_50_FPN.yaml"),
        torchvision_peer(FasterRCNN, 2, CLASSES + 1),
    ),
    Pair(
        *("Mask R-CNN", "configs/torchvision/mask_rcnn_R_50_FPN.yaml"),
        torchvision_peer(MaskRCNN, 2, CLASSES + 1),
    ),
    Pair(
        *("SSD300", "configs/torchvision/ssd300_VGG16.yaml"),
        lambda size: build_pair(SSD_SIDE, "cpu")[0],
    ),
)
MMDETECTION = (
    Pair(
        *("VFNet", "configs/vfnet_R_50_FPN_1x.yaml"),
        mmdet_peer("vfnet/vfnet_r50_fpn_1x_coco.py"),
    ),
    Pair(
        *("ATSS", "configs/mmdet/atss_R_50_FPN.yaml"),
        mmdet_peer("atss/atss_r50_fpn_1x_coco.py"),
    ),
    Pair(
        *("FCOS", "configs/mmdet/fcos_R_50_FPN_caffe.yaml"),
        mmdet_peer("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"),
    ),
    Pair(
        *("RetinaNet", "configs/mmdet/retinanet_R_50_FPN.yaml"),
        mmdet_peer("retinanet/retinanet_r50_fpn_1x_coco.py"),
    ),
    Pair(
        *("Faster R-CNN", "configs/mmdet/faster_rcnn_R_50_FPN.yaml"),
        mmdet_peer("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"),
    ),
    Pair(
        *("SSD300", "configs/mmdet/ssd300_VGG16.yaml"),
        mmdet_peer("ssd/ssd300_coco.py"),
    ),
)
LIBRARIES = {"torchvision": TORCHVISION, "mmdetection": MMDETECTION}
BATCHES = {"torchvision": torchvision_batch, "mmdetection": mmdet_batch}


def missing(library: str) -> str:
    """Why `library` takes no part; empty where it does."""
    if library == "torchvision":
        return ""
    try:
        import mmcv.ops  # noqa: F401
        import mmdet  # noqa: F401
    except (ImportError, AssertionError) as error:
        return f"mmdetection is left out, since it cannot be imported: {error}"
    return ""


def with_masks(batch: list[dict]) -> list[dict]:
    """`batch`, whose objects fill their boxes."""
    for entry in batch:
        truth = entry["instances"]
        masks = torch.zeros(len(truth), *entry["image"].shape[1:], dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, truth.gt_boxes.tensor.round().int().tolist()):
            mask[y1:y2, x1:x2] = True
        truth.gt_masks = BitMasks(masks)
    return batch


def build_ours(pair: Pair, device: str, precision: str) -> nn.Module:
    keys = ("MODEL.RETINANET.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES")
    classes = [x for key in keys for x in (key, str(pair.classes))]
    return build(pair.config, device, [*classes, "MODEL.PRECISION", precision])


def row(
    pair: Pair, library: str, device: str, size: Size, images: int, rounds: int, precision: str
) -> list[str]:
    """Name, and for a training step and an inference seconds of theirs and ours and the ratio."""
    size = (SSD_SIDE, SSD_SIDE) if pair.name == "SSD300" else size
    torch.manual_seed(0)
    peer, ours = pair.build_peer(size).to(device), build_ours(pair, device, precision)
    copy_weights(peer, ours)
    batch = random_batch(images, *size, CLASSES)
    if pair.name == "Mask R-CNN":
        batch = with_masks(batch)
    models, convert = {"theirs": peer, "ours": ours}, BATCHES[library]
    theirs = convert(batch, device)
    training = training_in_turn(models, {"theirs": theirs, "ours": batch}, rounds)
    single = {"theirs": convert(batch[:1], device), "ours": batch[:1]}
    inference = inference_in_turn(models, single, rounds)
    return [pair.name, *columns(training), *columns(inference)]


def columns(times: dict[str, list[float]]) -> list[str]:
    ratios = [ours / theirs for ours, theirs in zip(times["ours"], times["theirs"])]
    seconds = [f"{statistics.median(times[name]):.3f}" for name in ("theirs", "ours")]
    return [*seconds, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"]


def table(library: str, names: Sequence[str], *settings) -> str:
    """`settings` are those of `row`, from the device on."""
    images = settings[2]
    rows = [
        row(pair, library, *settings)
        for pair in LIBRARIES[library]
        if not names or pair.name in names
    ]
    step = [f"step, {images} images", "ours", "ratio"]
    headers = [library, *step, "inference, 1 image", "ours", "ratio"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = dict.fromkeys(pair.name for pairs in LIBRARIES.values() for pair in pairs)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--size", default="480x640", metavar="HxW", help="multiples of 32")
    parser.add_argument("--batch", type=int, default=1, help="images of a training step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument(
        "--precision", default="float32", help="MODEL.PRECISION of ours; theirs is float32"
    )
    add_device(parser)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"{unknown[0]!r} is no detector here; there are {', '.join(known)}.")
    height, width = map(int, arguments.size.split("x"))
    run = f"{machine(arguments.device)}, {arguments.rounds} rounds; ours {arguments.precision}"
    print(f"{height} x {width}, {run}")
    settings = (arguments.device, (height, width), arguments.batch, arguments.rounds)
    for library in arguments.library:
        told = missing(library)
        print(told or table(library, arguments.names, *settings, arguments.precision), flush=True)
        print()


if __name__ == "__main__":
    main()
