"""`iou-d2 compare`, under the name that it had before there was that command."""

from iou_d2.commands.compare import main
from iou_d2.commands.errors import ending_in_a_sentence

if __name__ == "__main__":
    with ending_in_a_sentence():
        main()
