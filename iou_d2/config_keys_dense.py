"""The config keys of dense detectors that iou_d2 adds to Detectron2."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_dense_keys(cfg: CfgNode) -> None:
    """Add them to `cfg`, in place."""
    _add_retinanet(cfg)
    _add_iou_retinanet(cfg)
    _add_point_detector(cfg)
    _add_unitbox(cfg)
    _add_ssd(cfg)


def _add_retinanet(cfg: CfgNode) -> None:
    """What RetinaNet does unlike Detectron2's with the weights of torchvision and mmdetection, for
    BoxLossRetinaNet and IoUAwareRetinaNet; the configs in torchvision/ and mmdet/ set it.

    Two anchor generators belong to it, MODEL.ANCHOR_GENERATOR.NAME "TorchvisionAnchorGenerator" and
    "LegacyAnchorGenerator" (mmdetection 1), and a backbone,
    "build_resnet_fpn_linear_p7_backbone" (mmdetection).
    """
    node = cfg.MODEL.RETINANET
    # The best anchor of an object learns it; if it overlaps another one more, "detectron2" (and
    # torchvision) has it learn that one, "mmdet" still the first. Anchors in the padding that
    # larger images of the batch bring are background in "detectron2" and learn nothing in "mmdet".
    node.ASSIGNER = "detectron2"
    # What losses of classes and boxes are divided by: the "running_mean" over batches of the number
    # of positive anchors (Detectron2), their number in the "batch" (mmdetection), or in the
    # "image", before the mean over images (torchvision).
    node.NORMALIZER = "running_mean"
    # Boxes that go to NMS: "as_predicted" (Detectron2), "clipped" to the image (torchvision), or
    # "clipped_with_area", those of which something is left (mmdetection).
    node.BEFORE_NMS = "as_predicted"
    # Whether convolutions have a bias before the norm that MODEL.RETINANET.NORM names: True in
    # Detectron2, False in torchvision.
    node.BIAS_BEFORE_NORM = True


def _add_iou_retinanet(cfg: CfgNode) -> None:
    """IoU-aware RetinaNet, arXiv 1912.05992."""
    cfg.MODEL.IOU_RETINANET = node = CfgNode()
    # Confidence = p^ALPHA * IoU^(1 - ALPHA), in [0, 1]. 1 is plain RetinaNet, 0 ranks by the
    # predicted IoU alone. The authors' code has 0.5.
    node.ALPHA = 0.5
    # Loss between the predicted and the true IoU of a positive anchor: "bce" (the authors' code),
    # "l1" or "l2" after a sigmoid.
    node.IOU_LOSS_TYPE = "bce"
    # Factor of that loss in the total; 1 in the authors' code.
    node.IOU_LOSS_WEIGHT = 1.0
    # Whether the gradient of the target, the IoU of the decoded box, reaches the box branch
    # (Eqn. 5). True in the authors' code and in the best row of their Table 4.
    node.IOU_TARGET_GRADIENT = True
    # Whether the IoU of RetinaNet is read off a tower of its own, like that of the boxes, and not
    # off theirs (the paper and its code). The authors' code can share fewer convolutions, too.
    node.IOU_TOWER = False


def _add_point_detector(cfg: CfgNode) -> None:
    """VarifocalNet, arXiv 2008.13367, and its rivals ATSS (1912.02424) and FCOS (1904.01355).

    What every dense detector has is read from MODEL.RETINANET: IN_FEATURES, NUM_CLASSES, NUM_CONVS,
    PRIOR_PROB, SCORE_THRESH_TEST, TOPK_CANDIDATES_TEST, NMS_THRESH_TEST.
    """
    cfg.MODEL.POINT_DETECTOR = node = CfgNode()
    # "VFNetHead"; without refinement "StarHead"; without star convolutions "PointHead" (rows of
    # VarifocalNet's ablation) and, with a quality branch, "QualityHead" (ATSS, FCOS).
    node.HEAD = "VFNetHead"
    # Groups of the towers' GroupNorm, 32 in all their code, and whether their last convolution is a
    # deformable one (VarifocalNet's DCN rows).
    node.NUM_GROUPS = 32
    node.DEFORMABLE_TOWER = False
    # The star convolutions of VarifocalNet: their weights at first, "normal" with a deviation of
    # 0.01 (its authors' code) or "kaiming" (mmdetection's since its pull request 4750), and whether
    # a GroupNorm follows each, as it does all others (ours; docs/ABLATIONS.md has what it gives).
    node.STAR_INIT = "normal"
    node.STAR_NORM = False
    # Whether the convolutions of the towers have a bias before their norm (torchvision, Detectron2,
    # AdelaiDet, mmdetection's conv_bias).
    node.TOWER_BIAS = False
    # What the four outputs of PointHead and QualityHead mean (ops/box_codec.py): "exp", the
    # logarithms of distances in DISTANCE_UNITS (FCOS as published in 2019); "relu", distances in
    # strides, cut at 0 (2006.09214, mmdetection's norm_on_bbox, torchvision, Detectron2,
    # AdelaiDet); "deltas" of the square anchor of ANCHOR_SCALE strides (ATSS as published).
    node.BOX_CODEC = "exp"
    # Whether each level has a learnt factor of these outputs; torchvision and Detectron2 have none.
    node.LEVEL_SCALES = True
    # Which tower QualityHead reads the quality off: "box" (ATSS, mmdetection's centerness_on_reg),
    # or "class" (FCOS as published in 2019).
    node.QUALITY_TOWER = "box"
    # Which points learn an object: "atss" (1912.02424, VarifocalNet) or "fcos" (1904.01355).
    node.ASSIGNER = "atss"
    # Where a cell has its point, in cells: 0 the top left corner, 0.5 the centre. None is 0 for
    # ATSS and 0.5 for FCOS, as in all published weights.
    node.POINT_OFFSET = None
    # ATSS and the "deltas" codec: side of a point's anchor in strides, 8 in all papers.
    node.ANCHOR_SCALE = 8.0
    # FCOS: positive points lie within so many strides of an object's centre (1.5 in its authors'
    # later code), or anywhere in it with 0 (the paper, VarifocalNet's code).
    node.CENTER_SAMPLING_RADIUS = 0.0
    # FCOS: the longest distance that each level learns, in pixels, those of the paper; the last one
    # learns all longer ones, too.
    node.MAX_DISTANCES = [64, 128, 256, 512, 1024]
    # FCOS: whether neither of two levels learns the distance that is the limit between them
    # (torchvision, Detectron2); both do in all other code.
    node.OPEN_RANGES = False
    # Pixels that a predicted distance of 1 means, for each level: those of VarifocalNet's code; 1
    # in FCOS. VarifocalNet's heads and the "exp" codec read them.
    node.DISTANCE_UNITS = [64, 128, 256, 512, 1024]
    # Loss of the classes: "varifocal" (2008.13367), "quality_focal" (2006.04388) or "focal" (ATSS,
    # FCOS).
    node.CLS_LOSS = "varifocal"
    # "varifocal": a negative has the weight ALPHA * p^GAMMA (Eqn. 2; 0.75 and 2 in the paper, which
    # finds 0.5 to 1.5 and 1 to 3 alike), a positive that of its quality, or 1 (the paper's
    # ablation).
    node.VARIFOCAL_ALPHA = 0.75
    node.VARIFOCAL_GAMMA = 2.0
    node.VARIFOCAL_IOU_WEIGHTED = True
    # "quality_focal": the weight |q - p|^BETA (2006.04388, Eqn. 4; 2 is best there). "focal" reads
    # Detectron2's MODEL.RETINANET.FOCAL_LOSS_ALPHA and FOCAL_LOSS_GAMMA.
    node.QUALITY_FOCAL_BETA = 2.0
    # What weighs the box losses and is learnt by class scores or by a quality branch: "iou" of the
    # predicted box with its object, or the "centerness" of a point in its object (ATSS, FCOS).
    node.QUALITY = "iou"
    # Loss of the boxes: "giou" in the code of all three, "iou", "unitbox", "diou", "ciou";
    # "smooth_l1" and "l2" are those of the distances in strides, with
    # MODEL.RETINANET.SMOOTH_L1_LOSS_BETA (ours).
    node.BOX_LOSS = "giou"
    # Factors of the losses of the initial and of the final box. A head that does not refine has
    # the final box only. Authors' code; 2 in ATSS, 1 in FCOS.
    node.BOX_LOSS_WEIGHTS = [1.5, 2.0]
    # What divides that loss: "weighted", by the quality of each box, over the sum of the qualities,
    # or the "plain" mean over positive points (torchvision, Detectron2).
    node.BOX_LOSS_MEAN = "weighted"
    # That sum, a mean over processes, is at least so much: 1 in VarifocalNet's and ATSS's code,
    # 1e-6 in FCOS's.
    node.MIN_QUALITY_SUM = 1.0
    # Whose way from class scores p and qualities q to detections (detectors/point_inference.py):
    # "authors" of FCOS and ATSS, sqrt(p * q) with a threshold of p; "mmdetection", p * q, the best
    # candidates by p; "torchvision", sqrt(p * q) with a threshold of it; "detectron2" likewise,
    # boxes clipped after NMS; "adelaidet", the authors', boxes clipped after NMS.
    node.INFERENCE = "authors"
    # Whether NMS suppresses boxes of other classes too (ours; no paper does).
    node.CLASS_AGNOSTIC_NMS = False


def _add_unitbox(cfg: CfgNode) -> None:
    """UnitBox, arXiv 1608.01471, and the backbone of the paper.

    What every dense detector has is read from MODEL.RETINANET: NUM_CLASSES, SCORE_THRESH_TEST,
    TOPK_CANDIDATES_TEST (pixels a class), NMS_THRESH_TEST. Each class has a confidence map of its
    own; the paper has faces alone.
    """
    cfg.MODEL.VGG = CfgNode()
    # Features of VGG-16, at first those that UnitBox reads: "conv1" to "conv5" at strides 1 to 16,
    # "pool1" to "pool5" at 2 to 32.
    cfg.MODEL.VGG.OUT_FEATURES = ["conv4", "conv5"]

    cfg.MODEL.UNITBOX = node = CfgNode()
    # Features that the branches read: "after stage 4" and "after stage 5", of which the paper does
    # not say whether that is before pooling.
    node.CONFIDENCE_FEATURE = "conv4"
    node.BOX_FEATURE = "conv5"
    # Positive pixels: those in the "box" of an object (Algorithm 1) or in the "ellipse" inscribed
    # in it (the confidence of Fig. 2).
    node.REGION = "ellipse"
    # "unitbox" is -ln IoU, "l2" its rival in the paper; also "iou", "giou", "diou", "ciou",
    # "smooth_l1". Distances are in pixels.
    node.BOX_LOSS = "unitbox"
    # Factors of the losses, means over pixels. The paper gives none.
    node.BOX_LOSS_WEIGHT = 1.0
    node.CONFIDENCE_LOSS_WEIGHT = 1.0
    # "nms" over the pixels whose confidence peaks (ours, the better one on faces and on shapes), or
    # "ellipses" fitted to the regions of confident pixels (the paper).
    node.INFERENCE = "nms"
    # Of "ellipses": confidence over which a pixel belongs to a region. The paper gives none.
    node.REGION_THRESH_TEST = 0.5


def _add_ssd(cfg: CfgNode) -> None:
    """SSD, arXiv 1512.02325, and RefineDet, arXiv 1711.06897, with the augmentations that they
    train with and that every detector may use. "The code" is that of their authors, in Caffe.

    What every dense detector has is read from MODEL.RETINANET: IN_FEATURES, NUM_CLASSES,
    SCORE_THRESH_TEST, TOPK_CANDIDATES_TEST (boxes a class), NMS_THRESH_TEST. IoUAwareSSD reads
    MODEL.IOU_RETINANET, too.
    """
    # What happens to training images, in this order; empty for what Detectron2 does (INPUT.CROP,
    # "shortest_edge", "flip"). "distort" changes colours, "expand" puts the image on a larger
    # canvas, "iou_crop" cuts out a part that overlaps an object, "square" resizes to SQUARE_SIZE
    # whatever the shape (with an interpolation by chance), "shortest_edge" as Detectron2 does,
    # "flip" mirrors as RANDOM_FLIP says. Test images are resized alike, and no more.
    cfg.INPUT.AUGMENTATIONS = []
    # Side in pixels of "square", and of the image that the sizes of SSD's default boxes are for. No
    # anchor of MODEL.ANCHOR_GENERATOR.NAME "ClippedAnchorGenerator" is longer, which a port of
    # RefineDet needs.
    cfg.INPUT.SQUARE_SIZE = 300
    # The canvas of "expand" is at most so many times as wide and as high (the code; "16 times" the
    # area in the paper).
    cfg.INPUT.EXPAND_RATIO = 4.0
    # Shortest and longest side of "iou_crop", in sides of the image, before its aspect ratio is
    # drawn: the code; 0.1 to 1 in the paper.
    cfg.INPUT.IOU_CROP_SIZES = [0.3, 1.0]

    # Features of build_ssd300_vgg16_backbone, build_ssd512_vgg16_backbone and
    # build_refinedet_vgg16_backbone: "conv4_3" at stride 8, "conv5_3", "fc7", "conv6_2" to
    # "conv9_2" (512: "conv10_2"; RefineDet: "conv6_2"), by the names of the code.
    cfg.MODEL.SSD_VGG = CfgNode()
    cfg.MODEL.SSD_VGG.OUT_FEATURES = ["conv4_3", "fc7", "conv6_2", "conv7_2", "conv8_2", "conv9_2"]

    cfg.MODEL.MULTIBOX = node = CfgNode()
    # A box is background below the first IoU, and learns an object from the second on (the code).
    node.IOU_THRESHOLDS = [0.5, 0.5]
    # Hardest negatives of an image for each of its positives; and of an image without a positive,
    # which in the code learns nothing.
    node.NEGATIVES_PER_POSITIVE = 3.0
    node.NEGATIVES_WITHOUT_OBJECTS = 0
    # Of Detectron2's Box2BoxTransform: the code's variances 0.1 and 0.2, inverted.
    node.BBOX_REG_WEIGHTS = [10.0, 10.0, 5.0, 5.0]
    # "smooth_l1" of the deltas (the papers); also "l2", "iou", "unitbox", "giou", "diou", "ciou",
    # which are ours. And the factor of this loss.
    node.BOX_LOSS = "smooth_l1"
    node.BOX_LOSS_WEIGHT = 1.0
    # "hard"; or Soft-NMS, "soft_linear" (RefineDet's code for COCO, with NMS_THRESH_TEST 0.3) or
    # "soft_gaussian".
    node.NMS = "hard"
    # Whether boxes end at the image before NMS compares them (torchvision), not after (the code).
    node.CLIP_BEFORE_NMS = False

    cfg.MODEL.SSD = node = CfgNode()
    # Sizes of default boxes, in percent of INPUT.SQUARE_SIZE: of the first level; and of the second
    # to the last, between which the others lie evenly in whole percents. Of the code for VOC, 300
    # px; 15/7 for COCO, 300 px, and VOC, 512 px; 10/4 for COCO, 512 px.
    node.FIRST_RATIO = 10
    node.MIN_RATIO = 20
    node.MAX_RATIO = 90
    # Of each level: width / height beside 1; their inverses come along.
    node.ASPECT_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    # Of each level: pixels between centres; empty for the strides of the features.
    node.STEPS = []
    # Cut sizes to whole pixels, as the code does; False is that of lufficc/SSD.
    node.TRUNCATE_SIZES = True
    # How default boxes end at the image: "none" (the code), "sides" (torchvision),
    # "centers_and_sides" (amdegroot/ssd.pytorch, lufficc/SSD), "corners" (Caffe's own key).
    node.CLIP = "none"

    cfg.MODEL.REFINEDET = node = CfgNode()
    # Boxes of lower objectness are no negatives of the second step and no detections: a background
    # score over 0.99 (the paper).
    node.MIN_OBJECTNESS = 0.01
    # MULTIBOX.IOU_THRESHOLDS of the first step. The author found [0.3, 0.7] more stable on VOC.
    node.ARM_IOU_THRESHOLDS = [0.5, 0.5]
    # Channels of the transfer connection blocks (the paper).
    node.CHANNELS = 256
