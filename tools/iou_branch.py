"""`iou-d2 iou-branch`, under the name that it had before there was that command."""

from iou_d2.commands.errors import ending_in_a_sentence
from iou_d2.commands.iou_branch import main

if __name__ == "__main__":
    with ending_in_a_sentence():
        main()
