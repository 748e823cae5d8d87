"""Evaluate a trained detector: `iou-d2 train --eval-only`.

    iou-d2 eval --config output/x/config.yaml --test coco:val.json \\
        MODEL.WEIGHTS output/x/model_final.pth
"""

from __future__ import annotations

import sys

from iou_d2.commands.train import main as train


def main(argv: list[str] | None = None):
    return train(["--eval-only", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
