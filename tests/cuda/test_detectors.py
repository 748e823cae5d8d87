"""Each detector on CUDA against itself on the CPU: losses, gradients, detections, precisions."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.structures import BitMasks
from detectron2.utils.events import EventStorage

from dense_detectors import DENSE
from iou_d2.detectors import iou_branch
from iou_d2.detectors.test_time_augmentation import with_tta
from iou_d2.engine.amp import trainer_class
from iou_d2.engine.trainer import Trainer

DEVICE = "cuda"
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "IoUNetCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
)
MASKS = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8")
DETECTORS = {
    **{name: (name, ()) for name in [*DENSE, "vfnet_star_shapes"]},
    "faster_rcnn_shapes": ("faster_rcnn_shapes", ()),
    "iou_net_shapes": ("iou_net_shapes", ()),
    "iou_net_cascade": ("iou_net_shapes", CASCADE),
    "iou_net_mask": ("iou_net_shapes", MASKS),
}
# All proposals and all anchors learn, so that no random number counts; none is near a threshold.
EVERYTHING = (
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "20000", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "10000"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "5000", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "5000"),
    *("MODEL.RPN.NMS_THRESH", "1.0", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "64", "INPUT.SQUARE_SIZE", "96"),
)
FEW = (
    *("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "60", "MODEL.RPN.POST_NMS_TOPK_TEST", "40"),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.01", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.05"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.ROI_BOX_HEAD.FC_DIM", "64"),
    *("TEST.DETECTIONS_PER_IMAGE", "60", "INPUT.SQUARE_SIZE", "96", "INPUT.MIN_SIZE_TEST", "96"),
    *("TEST.AUG.MIN_SIZES", "(80, 96)"),
)
# Weights of class scores, which are small at random.
SCORES = ("cls_score.weight", "cls_pred.weight", "confidence.weight", "objectness_logits.weight")
SCORES += ("cls_star.weight",)  # what these see


@pytest.fixture
def build(small_cfg):
    """A function: (name in DETECTORS, device, overrides) -> its config and model; the weights
    depend on the name alone, and give scores that differ by more than rounding."""

    def make(name: str, device: str, *overrides: str):
        config, settings = DETECTORS[name]
        where = ("MODEL.DEVICE", device)
        cfg = small_cfg(f"configs/quick/{config}.yaml", *settings, *where, *overrides)
        torch.manual_seed(0)
        model = Trainer.build_model(cfg)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(SCORES):
                    std = 0.1 if parameter.dim() == 4 else 0.3
                    parameter.copy_(std * torch.randn(parameter.shape))
        return cfg, model

    return make


@pytest.fixture
def batch(make_batch):
    """Two images with objects, which fill their boxes, and one without."""
    batch = make_batch([3, 0, 2])
    for entry in batch:
        truth = entry["instances"]
        masks = torch.zeros(len(truth), 96, 96, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, truth.gt_boxes.tensor.int().tolist()):
            mask[y1:y2, x1:x2] = True
        truth.gt_masks = BitMasks(masks)
    return batch


@pytest.fixture
def equal_jitter(monkeypatch):
    """RoIs of IoU branches that are the same on each device, whose random numbers differ."""
    draw = iou_branch.jittered_boxes

    def draw_on_cpu(gt_boxes, image_size, offsets, **settings):
        torch.manual_seed(len(gt_boxes))
        drawn = draw(gt_boxes.cpu(), image_size, offsets.cpu(), **settings)
        return tuple(x.to(gt_boxes.device) for x in drawn)

    monkeypatch.setattr(iou_branch, "jittered_boxes", draw_on_cpu)


def losses_of(model, batch):
    torch.manual_seed(0)
    with EventStorage():
        return model.train()(batch)


def same_losses(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, loss in wanted.items():
        assert math.isfinite(found[name].item())
        assert found[name].item() == pytest.approx(loss.item(), rel=tolerance, abs=1e-5), name


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_and_gradients_are_those_of_the_cpu(build, batch, equal_jitter, name):
    (_, ours), (_, wanted) = (build(name, device, *EVERYTHING) for device in (DEVICE, "cpu"))
    losses = [losses_of(model, batch) for model in (ours, wanted)]
    same_losses(*losses, 1e-3)
    for of_model in losses:
        sum(of_model.values()).backward()
    of_wanted = dict(wanted.named_parameters())
    largest = max(x.grad.norm().item() for x in of_wanted.values() if x.grad is not None)
    for parameter_name, parameter in ours.named_parameters():
        expected = of_wanted[parameter_name].grad
        assert (parameter.grad is None) == (expected is None)
        if expected is None:
            continue
        error = (parameter.grad.cpu() - expected).norm().item()
        assert error <= 1e-2 * expected.norm().item() + 1e-4 * largest, parameter_name


def unmatched(found, others, margin: float) -> int:
    """How many detections, of which scores below `margin` do not count, are not among `others`."""
    certain = found[found.scores > margin]
    near = certain.pred_boxes.tensor[:, None] - others.pred_boxes.tensor
    near = near.abs().amax(dim=2) <= 0.05 if len(others) else near[..., 0] > 0
    near &= (certain.scores[:, None] - others.scores).abs() <= 1e-3
    near &= certain.pred_classes[:, None] == others.pred_classes
    return int((~near.any(dim=1)).sum())


def may_differ(name: str, detections: int) -> int:
    """How many boxes: one of 50, since rounding decides about IoUs near to a threshold, and one of
    3 of UnitBox. Its maps have equal pixels along the border of the image, where rounding decides
    which of them NMS keeps: noise of 1e-7 on the logits moves 7 of 29 boxes."""
    return detections // (3 if name == "unitbox_shapes" else 50)


def same_detections(found, wanted, name: str, least: int = 6):
    """Compared as sets."""
    found = found.to("cpu")
    assert len(wanted) >= least
    # What is just kept here may just be dropped there.
    margin = wanted.scores.min().item() + 2e-3
    assert wanted.scores.std() > 0.01
    assert (wanted.scores > margin).sum() >= least // 2
    allowed = may_differ(name, len(wanted))
    assert unmatched(found, wanted, margin) <= allowed
    assert unmatched(wanted, found, margin) <= allowed
    assert found.get_fields().keys() == wanted.get_fields().keys()


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_detections_are_those_of_the_cpu(build, batch, name):
    (_, ours), (_, wanted) = (build(name, device, *FEW) for device in (DEVICE, "cpu"))
    for one in batch[:2]:
        found, expected = (x.eval()([one])[0]["instances"] for x in (ours, wanted))
        assert found.pred_boxes.tensor.is_cuda or DEVICE == "cpu"
        same_detections(found, expected, name)


@torch.no_grad()
def test_unitbox_says_and_finds_the_same_in_equal_maps(build, batch):
    (_, ours), (_, wanted) = (build("unitbox_shapes", x, *FEW) for x in (DEVICE, "cpu"))
    for one in batch[:2]:
        images = (x.eval().preprocess_image([one]).tensor for x in (ours, wanted))
        predicted, expected = (x.predict(y) for x, y in zip((ours, wanted), images))
        for found, map_ in zip(predicted, expected):
            torch.testing.assert_close(found.cpu(), map_, rtol=1e-4, atol=1e-4)
        logits, distances = expected.of_image(0, (96, 96))
        maps = (without_ties(logits), distances)
        found, kept = ours.extract(*(x.to(DEVICE) for x in maps)), wanted.extract(*maps)
        assert len(kept) > 20
        torch.testing.assert_close(found.pred_boxes.tensor.cpu(), kept.pred_boxes.tensor)
        torch.testing.assert_close(found.scores.cpu(), kept.scores)
        assert torch.equal(found.pred_classes.cpu(), kept.pred_classes)


def without_ties(logits: torch.Tensor) -> torch.Tensor:
    """Other logits of the same order. Upsampled ones are equal along a border of the image, and of
    equal ones every device takes others."""
    ranks = logits.flatten().argsort(stable=True).argsort().view_as(logits)
    return 6 * ranks / ranks.numel() - 3


@pytest.mark.parametrize(
    "settings",
    [
        ("REFINE_BY", "ascent", "REFINE_EARLY_STOP", "0.0", "REFINE_MAX_DROP", "-1.0"),
        ("NMS", "soft_linear", "SCORE_TIMES_IOU", "True"),
        ("NMS", "soft_gaussian", "SOFT_NMS_BY", "product"),
        ("NMS", "plain", "REFINE_BY", "regression"),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_ways_of_iou_net_are_those_of_the_cpu(build, batch, settings):
    names = [f"MODEL.IOU_NET.{x}" if i % 2 == 0 else x for i, x in enumerate(settings)]
    models = [build("iou_net_shapes", device, *FEW, *names)[1] for device in (DEVICE, "cpu")]
    found, expected = (x.eval()(batch[:1])[0]["instances"] for x in models)
    same_detections(found, expected, "iou_net_shapes")


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_an_image_without_detections(build, batch, name):
    nothing = ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.9999")
    nothing += ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.9999")
    _, model = build(name, DEVICE, *FEW, *nothing)
    for output in model.eval()(batch):
        assert len(output["instances"]) == 0


@pytest.mark.parametrize("name", ["iou_retinanet_shapes", "unitbox_shapes", "iou_net_shapes"])
@torch.no_grad()
def test_augmentation_finds_what_it_finds_on_the_cpu(build, batch, name):
    models = []
    for device in (DEVICE, "cpu"):
        cfg, model = build(name, device, *FEW)
        models.append(with_tta(cfg, model.eval()))
    found, expected = (x(batch[:1])[0]["instances"] for x in models)
    same_detections(found, expected, name)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(
    "keys",
    [
        ("MODEL.MEMORY_FORMAT", "channels_last"),
        ("MODEL.PRECISION", "bfloat16"),
        ("MODEL.PRECISION", "bfloat16", "MODEL.MEMORY_FORMAT", "channels_last"),
    ],
    ids=str,
)
def test_precision_and_memory_format(build, batch, equal_jitter, name, keys):
    (_, ours), (_, plain) = (build(name, DEVICE, *EVERYTHING, *x) for x in (keys, ()))
    found, wanted = losses_of(ours, batch), losses_of(plain, batch)
    if "bfloat16" not in keys:
        same_losses(found, wanted, 1e-3)
    assert sum(found.values()).item() == pytest.approx(sum(wanted.values()).item(), rel=0.1)
    sum(found.values()).backward()
    for parameter_name, parameter in ours.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name
    with torch.no_grad():
        for output in ours.eval()(batch):
            fields = output["instances"].get_fields()
            assert fields["pred_boxes"].tensor.dtype == fields["scores"].dtype == torch.float32


def steps_of(build, name, batch, amp: bool) -> list[float]:
    """The losses of three iterations on one batch."""
    cfg, model = build(name, DEVICE, *EVERYTHING, "SOLVER.BASE_LR", "0.0001")
    totals = []
    model.register_forward_hook(lambda m, inputs, losses: totals.append(sum(losses.values())))
    optimizer = Trainer.build_optimizer(cfg, model.train())
    trainer = trainer_class(amp, model)(model, [batch] * 3, optimizer)
    for iteration in range(3):
        torch.manual_seed(iteration)
        with EventStorage(iteration) as storage:
            trainer.storage, trainer.iter = storage, iteration
            trainer.run_step()
    return [total.item() for total in totals]


@pytest.mark.parametrize("name", DETECTORS)
def test_float16_trains_nearly_as_float32_does(build, batch, equal_jitter, name):
    precise, mixed = (steps_of(build, name, batch, amp) for amp in (False, True))
    assert all(map(math.isfinite, mixed)) and mixed != precise
    # The first steps in float16 may be left out, until the scale of the losses fits.
    assert mixed[0] == pytest.approx(precise[0], rel=0.05)
    assert mixed[-1] < 1.5 * precise[0]
