"""`iou-d2 convert`, under the name that it had before there was that command."""

from iou_d2.commands.convert import main

if __name__ == "__main__":
    main()
