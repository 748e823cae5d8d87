"""The quick configs of shapes, one of each kind of dense detector."""

DENSE = [
    "retinanet_shapes",
    "iou_retinanet_shapes",
    "vfnet_shapes",
    "atss_shapes",
    "fcos_shapes",
    "unitbox_shapes",
    "ssd_shapes",
    "ssd_iou_shapes",
    "refinedet_shapes",
]
