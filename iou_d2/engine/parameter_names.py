"""Parameters of a model by the beginning of their names, in whole dotted parts."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from iou_d2.errors import InputError


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name; one that the model has in two places by both."""
    return dict(model.named_parameters(remove_duplicate=False))


def is_under(name: str, beginning: str) -> bool:
    """Whether "backbone.fpn_output3.weight" is under "backbone.fpn_output3", say."""
    return name == beginning or name.startswith(f"{beginning}.")


def require_names(model: nn.Module, names: Sequence[str], key: str) -> None:
    """Raise an InputError where one of `names`, which the config has under `key`, is the beginning
    of no parameter; it comes with the nearest that are."""
    parameters = parameters_of(model)
    for name in names:
        if any(is_under(parameter, name) for parameter in parameters):
            continue
        parts = [parameter.split(".") for parameter in parameters]
        valid = {".".join(x[:end]) for x in parts for end in range(1, len(x) + 1)}
        near = difflib.get_close_matches(name[:200], sorted(valid), n=3, cutoff=0.0)
        raise InputError(
            f"{key} names {name[:200]!r}, but no parameter of the model begins so. The nearest "
            f"names are {', '.join(near)}."
        )
