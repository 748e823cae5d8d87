"""`iou-d2 compare`, under the name that it had before there was that command."""

from iou_d2.commands.compare import main

if __name__ == "__main__":
    main()
