"""`iou-d2 convert`, under the name that it had before there was that command."""

from iou_d2.commands.convert import main
from iou_d2.commands.errors import ending_in_a_sentence

if __name__ == "__main__":
    with ending_in_a_sentence():
        main()
