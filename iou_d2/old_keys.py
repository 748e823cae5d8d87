"""Config keys of earlier versions, which are read under their new names."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode

# Old key -> the keys that took its place.
SPLIT = {
    "MODEL.VFNET.REGRESS_RANGES": (
        "MODEL.POINT_DETECTOR.DISTANCE_UNITS",
        "MODEL.POINT_DETECTOR.MAX_DISTANCES",
    ),
}
# All keys of the node; FCOS and ATSS were configured there, too.
OLD_NODE, NEW_NODE = "MODEL.VFNET", "MODEL.POINT_DETECTOR"
# UnitBox had its own of what every dense detector has in MODEL.RETINANET.
UNITBOX = {
    f"MODEL.UNITBOX.{name}": f"MODEL.RETINANET.{name}"
    for name in ("NUM_CLASSES", "SCORE_THRESH_TEST", "TOPK_CANDIDATES_TEST", "NMS_THRESH_TEST")
}


def register_old_keys(cfg: CfgNode) -> None:
    """Let `cfg.merge_from_file` and `merge_from_list`, which read new names only, say what took the
    place of an old one."""
    cfg.register_renamed_key(OLD_NODE, NEW_NODE)
    for old, new in UNITBOX.items():
        cfg.register_renamed_key(old, new)


def rename_old_keys(values: dict[str, Any], architecture: str, where: str) -> dict[str, Any]:
    """`values` by dotted key, with new names for old ones; one line is printed if there are any.

    Args:
        architecture: MODEL.META_ARCHITECTURE. A UnitBox alone reads the old keys of MODEL.UNITBOX,
            which saved configs of every detector hold.
        where: what holds the keys, for the line.
    """
    renamed, found = dict(values), []
    for old in values:
        new = _new_names(old)
        if not new:
            continue
        found.append(f"{old} is now {' and '.join(new)}")
        value = renamed.pop(old)
        if old not in UNITBOX or architecture == "UnitBox":
            renamed.update(dict.fromkeys(new, value))
    if found:
        _keep_pooler_of_iou_net(values, renamed)
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        print(f"{where} has keys of an earlier iou_d2: {found[0]}{more}.", flush=True)
    return renamed


def _new_names(key: str) -> tuple[str, ...]:
    if key in UNITBOX:
        return (UNITBOX[key],)
    if key in SPLIT:
        return SPLIT[key]
    if key.startswith(f"{OLD_NODE}."):
        return (NEW_NODE + key[len(OLD_NODE) :],)
    return ()


def _keep_pooler_of_iou_net(values: dict[str, Any], renamed: dict[str, Any]) -> None:
    """IoU-Net used to pool precisely whatever POOLER_TYPE said in the configs that it saved."""
    key = "MODEL.ROI_BOX_HEAD.POOLER_TYPE"
    if key in values and str(values.get("MODEL.ROI_HEADS.NAME")).startswith("IoUNet"):
        renamed[key] = "PrRoIPool"
