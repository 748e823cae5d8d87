"""Hostile inputs for everything that reads a user's files or tensors: `make hostile`.

It lies in tools/, for a developer runs it in the checkout and no user needs it. One file a surface:
each makes inputs from a seed, feeds them to iou_d2 and judges what comes back. runner.py counts.
"""
