"""`iou-d2 detect`, where Detectron2 users look for it."""

from iou_d2.commands.threads import limit_spinning

limit_spinning()

from iou_d2.commands.detect import main  # noqa: E402
from iou_d2.commands.errors import ending_in_a_sentence  # noqa: E402

if __name__ == "__main__":
    with ending_in_a_sentence():
        main()
