"""`iou-d2 install-detectron2`, in a checkout from which iou_d2 is not installed yet."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from iou_d2.commands.install_detectron2 import main

if __name__ == "__main__":
    main()
