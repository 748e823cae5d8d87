"""`python -m iou_d2 COMMAND`, the same as `iou-d2 COMMAND`."""

from iou_d2.commands.main import main

if __name__ == "__main__":
    main()
