"""The config keys that iou_d2 adds to Detectron2, but for those of dense detectors, which
config_keys_dense.py has."""

from __future__ import annotations

from detectron2.config import CfgNode

from .config_keys_dense import add_dense_keys


def add_keys(cfg: CfgNode) -> None:
    """Add all keys to `cfg`, in place."""
    # Names of the classes, in the order of the model's outputs. Training fills them in from its
    # data, so that a saved config names what its model predicts (ours).
    cfg.MODEL.CLASS_NAMES = []
    # A file of `iou-d2 calibrate` that says what a predicted IoU is worth, for IoUAwareRetinaNet,
    # IoUAwareSSD, IoU-Net and a QualityHead of the QUALITY "iou": the calibrated IoU ranks in its
    # place (ours). Empty for none.
    cfg.MODEL.CALIBRATION = ""

    _add_precision(cfg)

    # What a user insists on where data look wrong (ours): boxes that look like corners (XYXY) or
    # fractions of the image are taken as XYWH in pixels; images outside the image folder are read;
    # classes of a test set that the model does not know are left out of it.
    cfg.DATASETS.TRUST_BOXES = False
    cfg.DATASETS.TRUST_PATHS = False
    cfg.DATASETS.TRUST_CLASSES = False

    # "SGD" as in Detectron2 and the papers, or "AdamW" (ours, for small models from scratch).
    cfg.SOLVER.OPTIMIZER = "SGD"

    # A project of Weights & Biases for the curves of a training (ours; needs the package wandb).
    # Empty for none.
    cfg.WANDB = CfgNode()
    cfg.WANDB.PROJECT = ""

    _add_fine_tuning(cfg)
    _add_test_augmentation(cfg)
    _add_mobilenet_v2(cfg)
    _add_rcnn(cfg)
    _add_spp(cfg)
    _add_box_losses(cfg)
    _add_iou_net(cfg)
    add_dense_keys(cfg)


def _add_precision(cfg: CfgNode) -> None:
    """How networks compute, which changes times more than results (ours; docs/TRAINING.md)."""
    # "float32", or "bfloat16" for the backbone and the heads in training and inference, where
    # weights, all that follows the networks, and IoU branches stay in float32. For CPUs with
    # bfloat16 instructions (avx512_bf16, amx_bf16) and GPUs; other CPUs take longer with it.
    # Detectron2's SOLVER.AMP.ENABLED is for training alone.
    cfg.MODEL.PRECISION = "float32"
    # How feature maps lie in memory: "channels_last" as NHWC, "contiguous" as NCHW, "auto" the
    # first on CPUs and the second on GPUs.
    cfg.MODEL.MEMORY_FORMAT = "auto"
    # Whether torch.compile makes code of the backbone and the heads, of those that MODEL.PRECISION
    # is about: seconds to minutes at the first images, and again for the second size of images.
    cfg.MODEL.COMPILE = False


def _add_fine_tuning(cfg: CfgNode) -> None:
    """What one changes to train from weights that know something already (docs/FINE_TUNING.md)."""
    # Beginnings of names of parameters, in whole dotted parts, such as "backbone.bottom_up": these
    # do not learn, and batch norm among them keeps its statistics (ours).
    cfg.SOLVER.FREEZE = []
    # Pairs of such a name and a factor over 0 of the learning rate; the longest name decides, other
    # parameters have 1. Such as [["backbone.bottom_up", 0.1]] (DETR has that factor).
    cfg.SOLVER.LR_FACTORS = []
    # d of the average d * average + (1 - d) * weights after each iteration, in [0, 1), such as
    # 0.999; 0 for none. It begins lower, as (1 + t) / (10 + t) after t iterations. The average is
    # evaluated and saved as the model.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Evaluations in a row, every TEST.EVAL_PERIOD iterations, that end the training where none has
    # a better box AP on the first of DATASETS.TEST than one before them; 0 for never (ours).
    cfg.SOLVER.PATIENCE = 0


def _add_test_augmentation(cfg: CfgNode) -> None:
    """Test-time augmentation, for every detector. Detectron2's keys switch it on and say what the
    views of an image are: TEST.AUG.ENABLED; MIN_SIZES and MAX_SIZE, which stand for
    INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST or, where INPUT.AUGMENTATIONS names "square", for sides of
    squares; FLIP, which adds the mirror image of each.
    """
    node = cfg.TEST.AUG
    # For each of MIN_SIZES a pair, such as [0, 160]: of the boxes that are found at that size,
    # those are kept whose longer side is over the first number and whose shorter side is under the
    # second one, in pixels of the image (RefineDet's multi-scale test). Empty keeps all.
    node.BOX_SIZES = []
    # "nms": the candidates of all views go together through the NMS of the method (Detectron2
    # merges what NMS has left of each view). "vote": NMS of each view, and then box voting;
    # "soft_vote" keeps the boxes that voted, too, with lower scores (RefineDet's code for VOC, and
    # for COCO).
    node.MERGE = "nms"
    # Boxes whose IoU with a better one reaches this vote for it; a box that voted is kept by
    # "soft_vote" where its score times 1 - IoU reaches the second number (RefineDet's code).
    node.VOTE_THRESH = 0.45
    node.SOFT_VOTE_MIN_SCORE = 0.01


def _add_mobilenet_v2(cfg: CfgNode) -> None:
    """MobileNetV2, arXiv 1801.04381. MODEL.BACKBONE.FREEZE_AT counts its stages as a ResNet's: 1 is
    the stem, 2 to 5 end with res2 to res5.

    MODEL.WEIGHTS may be "torchvision://mobilenet_v2", or resnet18, resnet34, resnet50, resnet101,
    resnet152 or vgg16 in its place: ImageNet weights, which take RGB (iou_d2/engine/pretrained.py).
    """
    cfg.MODEL.MOBILENET_V2 = node = CfgNode()
    # Features: "res2" to "res5" at strides 4 to 32.
    node.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Factor of all numbers of channels; torchvision has weights for 1 alone.
    node.WIDTH = 1.0
    # "FrozenBN" keeps the statistics of the weights, "BN" and "SyncBN" learn them anew.
    node.NORM = "FrozenBN"


def _add_rcnn(cfg: CfgNode) -> None:
    """What the R-CNNs of torchvision and of mmdetection do unlike Detectron2's; the configs in
    torchvision/ and mmdet/ set it for their weights."""
    # What "FrozenBN" adds to variances, for "build_torchvision_resnet_fpn_backbone" and
    # "build_torchvision_resnet_fpn_p6p7_backbone": 1e-5 in Detectron2, 0 in the published
    # fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn and retinanet_resnet50_fpn of torchvision, 1e-5
    # in what it has trained since from other weights.
    cfg.MODEL.RESNETS.FROZEN_BN_EPS = 1e-5
    # Sides of a proposal are longer than that, in pixels of the network input; 0.001 in
    # torchvision. For BoxLossRPN; Detectron2's MODEL.PROPOSAL_GENERATOR.MIN_SIZE, in whole pixels,
    # holds too.
    cfg.MODEL.RPN.MIN_SIZE = 0.0
    # Sides of a detected box are at least that, in pixels of the network input; 0.01 in
    # torchvision. For BoxLossROIHeads and BoxLossCascadeROIHeads.
    cfg.MODEL.ROI_HEADS.MIN_SIZE_TEST = 0.0
    # What of the stages of a Cascade R-CNN is averaged into class scores: "probabilities" (arXiv
    # 1712.00726, Detectron2) or "logits" (mmdetection).
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.SCORE_MEAN = "probabilities"


def _add_spp(cfg: CfgNode) -> None:
    """Spatial pyramid pooling, arXiv 1406.4729: of boxes, and as the block of YOLOv3-SPP."""
    # Bins a side of each level of MODEL.ROI_BOX_HEAD.POOLER_TYPE "SPP", the maximum (the paper), or
    # "PrRoISPP", the exact mean (ours): [4, 2, 1] are the 21 bins of its figure 3, [6, 3, 2, 1] the
    # 50 of its detector.
    cfg.MODEL.ROI_BOX_HEAD.SPP_LEVELS = [6, 3, 2, 1]
    # The block of YOLOv3-SPP before the FPN of another backbone, which has MODEL.BACKBONE.NAME
    # "build_spp_backbone" and is named here, such as "build_resnet_fpn_backbone".
    cfg.MODEL.SPP_BLOCK = node = CfgNode()
    node.BACKBONE = ""
    # Sides of its max pools in feature pixels, odd (YOLOv3-SPP).
    node.KERNELS = [5, 9, 13]


def _add_box_losses(cfg: CfgNode) -> None:
    """The losses of boxes. They are chosen by Detectron2's keys BBOX_REG_LOSS_TYPE of
    MODEL.RETINANET (BoxLossRetinaNet, IoUAwareRetinaNet), MODEL.RPN (BoxLossRPN) and
    MODEL.ROI_BOX_HEAD (BoxLossROIHeads, BoxLossCascadeROIHeads, IoU-Net): "smooth_l1", "l2" (of the
    deltas), "iou" (1 - IoU), "unitbox" (-ln IoU), "giou", "diou" or "ciou".

    "smooth_l1" turns from a parabola to a line at the beta of Detectron2's SMOOTH_L1_BETA
    (RetinaNet: SMOOTH_L1_LOSS_BETA), in units of deltas: 0, its default, is plain L1; 1 is the
    papers' (arXiv 1504.08083, Eqn. 3, and 1506.01497), 1/9 their code's for the RPN.
    """
    # Factor of that loss in RetinaNet, as Detectron2's BBOX_REG_LOSS_WEIGHT of the other two. With
    # the IoU losses 2 is usual here (ATSS); for the box head 10, and 12 for "ciou" (mmdetection).
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT = 1.0
    # What a predicted box with x1 > x2 or y1 > y2 counts as in the IoU losses of all detectors: one
    # that is "collapsed" to the middle of such a side, so that it overlaps nothing (ours), or the
    # box of the "sorted" corners (GIoU, arXiv 1902.09630, Algorithm 2). The heads here predict
    # none, since sides come of an exp or a ReLU; a head of your own may.
    cfg.MODEL.INVERTED_BOXES = "collapsed"


def _add_iou_net(cfg: CfgNode) -> None:
    """IoU-Net, arXiv 1807.11590. `MMI` is its reproduction, thisisi3/OpenMMLab-IoUNet."""
    cfg.MODEL.IOU_NET = node = CfgNode()
    # Loss of the IoU branch: "smooth_l1" on 2 * IoU - 1 (the authors), "bce" on the IoU (MMI).
    node.LOSS_TYPE = "smooth_l1"
    # Factor of that loss, a mean over RoIs. The paper gives none; 5 in MMI.
    node.LOSS_WEIGHT = 5.0
    # Whether the loss of the IoU branch trains what it shares with the detector, too, as in the
    # paper's joint training; without, the detector learns as if there were no such branch (ours).
    node.FEATURE_GRADIENT = True
    # One IoU for all classes in place of one a class (the authors).
    node.CLASS_AGNOSTIC = False
    # Jittered training RoIs around a ground truth, and at most in an image. The paper gives none;
    # those of MMI, which found 150 to 250 and 1000 alike.
    node.ROIS_PER_GT = 250
    node.ROIS_PER_IMAGE = 1000
    # Beside them so many of an image's proposals that have an object, at most, drawn among those
    # that the box head trains on. The paper has none, since few of them have a high IoU (ours). Not
    # for StandaloneIoUNet, which has no proposals, nor for IoUNetRes5ROIHeads.
    node.PROPOSALS_PER_IMAGE = 0
    # The box of a proposal that goes to NMS for a class: that of "each_class" (Detectron2), or for
    # all of them that of its "best_class" (MMI).
    node.BOX_OF = "each_class"
    # "guided" is IoU-guided NMS (Algorithm 1), "plain" Detectron2's; "soft_linear" and
    # "soft_gaussian" are Soft-NMS. All use MODEL.ROI_HEADS.NMS_THRESH_TEST, which the paper does
    # not give ("e.g. 0.5", an author); the Gaussian uses none.
    node.NMS = "guided"
    # What ranks boxes in guided NMS: "iou" (Algorithm 1), "score" (of the class), "product" (MMI).
    node.RANK_BY = "iou"
    # What Soft-NMS lowers, which then is the score: that of the class ("score", its authors), or
    # the "product" with the predicted IoU (ours), which SCORE_TIMES_IOU would multiply once more.
    node.SOFT_NMS_BY = "score"
    # "ascent" on the predicted IoU (Algorithm 2) or, as its rival, "regression" by the box head.
    node.REFINE_BY = "ascent"
    # Steps of it, T of Algorithm 2, where it is 5; 0 switches refinement off.
    node.REFINE_STEPS = 5
    # lambda of Algorithm 2, 0.5 there: the step in units of gradient times box size. MMI found 2
    # best.
    node.REFINE_STEP_SIZE = 0.5
    # Omega_1 and Omega_2 of Algorithm 2, 0.001 and -0.01 there: a box stops when its predicted IoU
    # changes by less than the first or by less than the second, which is negative.
    node.REFINE_EARLY_STOP = 0.001
    node.REFINE_MAX_DROP = -0.01
    # Undo a step that lowered the predicted IoU; Algorithm 2 keeps it.
    node.REFINE_ROLL_BACK = False
    # Multiply the final score by the predicted IoU, which the paper does not do and MMI does.
    node.SCORE_TIMES_IOU = False
