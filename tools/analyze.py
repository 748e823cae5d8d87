"""`iou-d2 analyze`, under the name that it had before there was that command."""

from iou_d2.commands.analyze import main

if __name__ == "__main__":
    main()
