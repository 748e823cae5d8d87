"""MODEL.INVERTED_BOXES in the detectors: who reads it, and what it does to a head of one's own."""

from __future__ import annotations

import pytest
from detectron2.modeling import build_model

from iou_d2.ops.box_losses import collapsed, sorted_corners
from point_detector_by_hand import point_detector_builder, predict

KEY = "MODEL.INVERTED_BOXES"


def losses_of(model, predictions, batch):
    sizes = [tuple(x["image"].shape[-2:]) for x in batch]
    return model.losses(predictions, sizes, [x["instances"] for x in batch])


@pytest.mark.parametrize("word", ["collapsed", "sorted"])
def test_inverted_distances_of_a_head(word, small_cfg, make_batch):
    """FCOS whose distances are those to the opposite sides, from behind: the corners change places,
    and its losses stay where they are sorted."""
    model = point_detector_builder(small_cfg)("fcos", KEY, word).train()
    batch = make_batch([3, 2])
    predictions, _ = predict(model, batch)
    expected = losses_of(model, predictions, batch)
    opposite = [
        x._replace(distances=tuple(-d[:, [2, 3, 0, 1]] for d in x.distances)) for x in predictions
    ]
    found = losses_of(model, opposite, batch)
    assert found["loss_cls"] == expected["loss_cls"]
    # -ln of the least IoU that there is.
    wanted = expected["loss_box"].item() if word == "sorted" else 13.8155
    assert found["loss_box"].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "where", "kind"),
    [
        ("retinanet_R_50_FPN_1x", ("",), "MODEL.RETINANET.BBOX_REG_LOSS_TYPE"),
        ("faster_rcnn_R_50_FPN_1x", ("proposal_generator",), "MODEL.RPN.BBOX_REG_LOSS_TYPE"),
        (
            "faster_rcnn_R_50_FPN_1x",
            ("roi_heads.box_predictor",),
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
        ),
        ("quick/unitbox_shapes", ("",), "MODEL.UNITBOX.BOX_LOSS"),
        ("quick/ssd_shapes", ("loss",), "MODEL.MULTIBOX.BOX_LOSS"),
        ("quick/refinedet_shapes", ("arm_loss", "odm_loss"), "MODEL.MULTIBOX.BOX_LOSS"),
    ],
)
def test_every_detector_reads_it(config, where, kind, small_cfg):
    for word, part in (("collapsed", collapsed), ("sorted", sorted_corners)):
        model = build_model(small_cfg(config, kind, "giou", KEY, word))
        for name in where:
            owner = model
            for step in filter(None, name.split(".")):
                owner = getattr(owner, step)
            assert owner.box_loss.inverted is part


def test_another_word_is_named(small_cfg):
    with pytest.raises(ValueError, match=f"{KEY} is one of collapsed, sorted, but it is 'clip'"):
        build_model(small_cfg("retinanet_R_50_FPN_1x", KEY, "clip"))
