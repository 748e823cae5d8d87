"""`iou-d2 refine`, under the name that it had before there was that command."""

from iou_d2.commands.refine import main

if __name__ == "__main__":
    main()
