"""`iou-d2 detect`, where Detectron2 users look for it."""

import sys

from iou_d2.commands.main import run_command

if __name__ == "__main__":
    run_command("detect", sys.argv[1:])
