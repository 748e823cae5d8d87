"""What the commands take: a module each, whose docstring is the help, with `parse_args(argv)`.

They load no more than the standard library, so that --help and a wrong argument need not wait for
torch and Detectron2. The module of the same name in iou_d2/commands has `run`, which takes what
`parse_args` gives.
"""
