"""PrRoIPooler beside Detectron2's ROIPooler, and in its ROI heads."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ROIAlign
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from iou_d2.detectors.pooler import PrRoIPooler, use_prroi_pool
from iou_d2.layers import PrRoIPool, prroi_pool_reference
from iou_d2.layers.spp import RoIMaxPool

SCALES = [1 / 4, 1 / 8, 1 / 16]


def make_pyramid(images=2, channels=5, size=128):
    generator = torch.Generator().manual_seed(0)
    sides = [int(size * scale) for scale in SCALES]
    return [torch.randn(images, channels, s, s + 4, generator=generator) for s in sides]


def make_boxes(counts, seed=0, largest=100.0):
    generator = torch.Generator().manual_seed(seed)
    boxes = []
    for count in counts:
        start = torch.rand(count, 2, generator=generator) * 60
        side = 1 + torch.rand(count, 2, generator=generator) ** 3 * largest
        boxes.append(Boxes(torch.cat([start, start + side], 1)))
    return boxes


def test_every_box_is_pooled_from_its_own_level():
    pyramid, boxes = make_pyramid(), make_boxes([40, 25], largest=300)
    pooler = PrRoIPooler((3, 2), SCALES, canonical_box_size=64, canonical_level=3)
    levels = pooler.assign_levels(boxes)
    assert set(levels.tolist()) == {0, 1, 2}
    out = pooler(pyramid, boxes)
    tensors = torch.cat([b.tensor for b in boxes])
    for m in range(65):
        roi = torch.cat([torch.tensor([float(m >= 40)]), tensors[m]])[None]
        level = levels[m].item()
        want = prroi_pool_reference(pyramid[level], roi, (3, 2), SCALES[level], aligned=True)
        torch.testing.assert_close(out[m : m + 1], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chosen", [(0,), (2,), (1, 2), (0, 1, 2)])
def test_boxes_that_come_by_level_are_pooled_alike_and_every_map_has_a_gradient(chosen):
    pyramid, (boxes,) = make_pyramid(images=1), make_boxes([40], largest=300)
    pooler = PrRoIPooler(3, SCALES, canonical_box_size=64, canonical_level=3)
    out, levels = pooler(pyramid, [boxes]), pooler.assign_levels([boxes])
    index = torch.cat([(levels == level).nonzero().squeeze(1) for level in chosen])
    assert len(index) > 2
    assert torch.equal(pooler(pyramid, [boxes[index]]), out[index])
    for level in pyramid:
        level.requires_grad_()
    pooled = pooler(pyramid, [boxes[index]])
    assert torch.equal(pooled, out[index])
    gradients = torch.autograd.grad(pooled.sum(), pyramid)
    assert [bool(x.any()) for x in gradients] == [level in chosen for level in range(3)]


def test_a_smooth_map_gives_what_roi_align_gives():
    """Both are exact on a plane, so that this checks levels, scales and the half-pixel shift
    against Detectron2."""
    pyramid = [
        (torch.arange(s).view(1, 1, s, 1) + 2.0 * torch.arange(s).view(1, 1, 1, s)) / s
        for s in (64, 32, 16)
    ]
    centers = torch.linspace(100, 150, 30)
    side = torch.logspace(1.3, 1.9, 30)  # ROIAlign widens boxes below one feature pixel
    boxes = [Boxes(torch.stack([centers - side / 2] * 2 + [centers + side / 2] * 2, 1))]
    settings = {"scales": SCALES, "canonical_box_size": 64, "canonical_level": 3}
    ours = PrRoIPooler(4, **settings)
    theirs = ROIPooler(4, pooler_type="ROIAlignV2", sampling_ratio=0, **settings)
    torch.testing.assert_close(ours(pyramid, boxes), theirs(pyramid, boxes))
    legacy = PrRoIPooler(4, aligned=False, **settings)
    theirs = ROIPooler(4, pooler_type="ROIAlign", sampling_ratio=0, **settings)
    torch.testing.assert_close(legacy(pyramid, boxes), theirs(pyramid, boxes))


def test_given_levels_stay_while_boxes_move():
    pyramid, boxes = make_pyramid(), make_boxes([20, 20])
    pooler = PrRoIPooler(2, SCALES, canonical_box_size=64, canonical_level=3)
    levels = pooler.assign_levels(boxes)
    grown = [Boxes(b.tensor * torch.tensor([0.5, 0.5, 2, 2])) for b in boxes]
    assert not torch.equal(pooler.assign_levels(grown), levels)
    out = pooler(pyramid, grown, levels)
    for level, pool in enumerate(pooler.level_poolers):
        rois = torch.cat(
            [torch.arange(2).repeat_interleave(20)[:, None], torch.cat([b.tensor for b in grown])],
            1,
        )
        index = levels == level
        torch.testing.assert_close(out[index], pool(pyramid[level], rois[index]))


def test_gradients_reach_the_boxes_and_the_maps():
    pyramid = [f.requires_grad_() for f in make_pyramid()]
    tensors = [b.tensor.requires_grad_() for b in make_boxes([30, 30], largest=300)]
    pooler = PrRoIPooler(2, SCALES, canonical_box_size=64, canonical_level=3)
    pooler(pyramid, [Boxes(t) for t in tensors]).square().sum().backward()
    assert all((t.grad != 0).any(1).all() for t in tensors)
    assert all((f.grad != 0).any() for f in pyramid)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("counts", [[0, 0], [0, 3]])
def test_images_without_boxes(levels, counts):
    pyramid = [f.requires_grad_() for f in make_pyramid()[:levels]]
    out = PrRoIPooler(2, SCALES[:levels])(pyramid, make_boxes(counts))
    assert out.shape == (sum(counts), 5, 2, 2)
    out.sum().backward()
    assert all(f.grad is not None for f in pyramid)


def test_no_images():
    assert PrRoIPooler(2, SCALES)([f[:0] for f in make_pyramid()], []).shape == (0, 5, 2, 2)


@pytest.mark.parametrize(
    "words, maps, images, levels",
    [
        ("3 levels, got 2 maps", 2, 2, None),
        ("2 images and boxes for 1", 3, 1, None),
        ("8 boxes and levels of shape", 3, 2, torch.zeros(7, dtype=torch.int64)),
    ],
)
def test_wrong_arguments_raise_sentences(words, maps, images, levels):
    with pytest.raises(ValueError, match=words):
        PrRoIPooler(2, SCALES)(make_pyramid()[:maps], make_boxes([4, 4][:images]), levels)


def small_model(roi_heads):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.NAME = roi_heads
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = roi_heads == "CascadeROIHeads"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    return build_model(cfg)


@pytest.mark.parametrize("roi_heads", ["StandardROIHeads", "CascadeROIHeads"])
def test_a_built_model_is_converted(roi_heads):
    torch.manual_seed(0)
    model = small_model(roi_heads).eval()
    names = list(model.state_dict())
    assert use_prroi_pool(model) is model
    poolers = [m for m in model.modules() if isinstance(m, ROIPooler)]
    assert [type(p) for p in poolers] == [PrRoIPooler] * 2
    assert [p.output_size for p in poolers] == [(7, 7), (14, 14)]
    assert all(type(p) is PrRoIPool and p.aligned for m in poolers for p in m.level_poolers)
    assert list(model.state_dict()) == names
    with torch.no_grad():
        image = torch.rand(3, 96, 128) * 255
        instances = model([{"image": image, "height": 96, "width": 128}])[0]["instances"]
    assert len(instances) > 0 and instances.scores.isfinite().all() and instances.has("pred_masks")


def test_a_model_without_poolers_is_refused():
    with pytest.raises(ValueError, match="Conv2d has no ROIPooler"):
        use_prroi_pool(torch.nn.Conv2d(1, 1, 1))


POOLERS = {
    "PrRoIPool": (PrRoIPool, True),
    "PrRoIPoolLegacy": (PrRoIPool, False),
    "ROIAlignV2": (ROIAlign, True),
    "ROIAlign": (ROIAlign, False),
    "ROIPool": (RoIMaxPool, None),
}


@pytest.mark.parametrize("roi_heads", ["BoxLossROIHeads", "BoxLossCascadeROIHeads"])
@pytest.mark.parametrize("kind", POOLERS)
def test_the_pooler_of_every_head_is_chosen_by_config(small_cfg, make_batch, kind, roi_heads):
    cfg = small_cfg(
        "configs/faster_rcnn_R_50_FPN_1x.yaml",
        *("MODEL.ROI_HEADS.NAME", roi_heads, "MODEL.MASK_ON", "True"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", str(roi_heads != "BoxLossROIHeads")),
        *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", kind, "MODEL.ROI_MASK_HEAD.POOLER_TYPE", kind),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
        *("MODEL.RPN.POST_NMS_TOPK_TEST", "50", "MODEL.RESNETS.NORM", "BN"),
    )
    model = build_model(cfg).eval()
    poolers = [m for m in model.modules() if isinstance(m, ROIPooler)]
    layer, aligned = POOLERS[kind]
    assert [p.output_size for p in poolers] == [(7, 7), (14, 14)]
    for level in (level for pooler in poolers for level in pooler.level_poolers):
        assert type(level) is layer and getattr(level, "aligned", None) == aligned
    with torch.no_grad():
        model(make_batch([0]))


def test_iou_net_pools_by_config_and_refuses_to_climb_without_a_gradient(small_cfg, make_batch):
    kind = ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2")
    config_file = "configs/quick/iou_net_shapes.yaml"
    with pytest.raises(ValueError, match="POOLER_TYPE is 'ROIAlignV2', .* no gradient for boxes"):
        build_model(small_cfg(config_file, *kind))
    model = build_model(small_cfg(config_file, *kind, "MODEL.IOU_NET.REFINE_STEPS", "0")).eval()
    assert type(model.roi_heads.iou_branch.pooler.level_poolers[0]) is ROIAlign
    with torch.no_grad():
        assert model(make_batch([0]))[0]["instances"].has("pred_ious")


@pytest.mark.parametrize("samples", [0, 1, 2])
def test_the_samples_of_roi_align_are_chosen_by_config(small_cfg, samples):
    cfg = small_cfg(
        "configs/quick/faster_rcnn_shapes.yaml",
        *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", str(samples)),
    )
    pooler = build_model(cfg).roi_heads.box_pooler
    assert {x.sampling_ratio for x in pooler.level_poolers} == {samples}


def test_an_unknown_pooler_is_named(small_cfg):
    with pytest.raises(ValueError, match="PrRoIAlign"):
        build_model(
            small_cfg(
                "configs/faster_rcnn_R_50_FPN_1x.yaml",
                *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "PrRoIAlign"),
            )
        )
