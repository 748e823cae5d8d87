"""`iou-d2 refine`, under the name that it had before there was that command."""

from iou_d2.commands.errors import ending_in_a_sentence
from iou_d2.commands.refine import main

if __name__ == "__main__":
    with ending_in_a_sentence():
        main()
