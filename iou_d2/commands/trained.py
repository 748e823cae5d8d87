"""Trained models as commands load them: whole, and for the classes that are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from iou_d2.engine.checkpoint import ReadCheckpointer
from iou_d2.engine.config_checks import check_config
from iou_d2.engine.safe_load import read_checkpoint_file
from iou_d2.errors import InputError


class WholeCheckpointer(ReadCheckpointer):
    """A ReadCheckpointer that refuses weights which would leave a part of the model untrained."""

    def load(self, path: str, *args, **kwargs) -> dict:
        self.source = path
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint):
        parameters = [name for name, _ in self.model.named_parameters()]
        incompatible = super()._load_model(checkpoint)
        if incompatible.incorrect_shapes:
            name, theirs, ours = incompatible.incorrect_shapes[0]
            raise InputError(
                f"{self.source} does not fit the config: {name} is {tuple(theirs)} there and "
                f"{tuple(ours)} in the model, and {len(incompatible.incorrect_shapes) - 1} others "
                "differ too. Is the number of classes another?"
            )
        missing = [name for name in parameters if name in set(incompatible.missing_keys)]
        if missing:
            raise InputError(
                f"{self.source} lacks {len(missing)} of the {len(parameters)} tensors that the "
                f"model of the config learns, such as {missing[0]}: it is of another model."
            )
        return incompatible


def read_weights(cfg: CfgNode) -> dict:
    """What MODEL.WEIGHTS hold. Raises InputError where nothing is named, or what was named is not
    there or no checkpoint."""
    if not cfg.MODEL.WEIGHTS:
        raise InputError("Nothing is trained: give MODEL.WEIGHTS at the end of the command line.")
    return read_checkpoint_file(local_path(cfg.MODEL.WEIGHTS))


def local_path(weights: str) -> str:
    """The file of MODEL.WEIGHTS, downloaded where it lies elsewhere."""
    try:
        return PathManager.get_local_path(weights)
    except (OSError, ValueError, AssertionError, KeyError, RuntimeError) as error:
        raise InputError(f"MODEL.WEIGHTS {weights} cannot be fetched: {error}") from error


def fill(model: nn.Module, cfg: CfgNode, content: dict) -> nn.Module:
    """`model` with the weights in `content`, which `read_weights` read for `cfg`."""
    WholeCheckpointer(model, content).load(cfg.MODEL.WEIGHTS)
    return model


def load_trained(cfg: CfgNode) -> nn.Module:
    """The model of `cfg` with MODEL.WEIGHTS, in test mode.

    Raises InputError: the config is wrong, or the weights are not there, do not fit or do not fill
    the model.
    """
    check_config(cfg)
    content = read_weights(cfg)
    names = names_in(content, cfg.MODEL.WEIGHTS)
    if names and cfg.MODEL.CLASS_NAMES:
        require_same_names(names, list(cfg.MODEL.CLASS_NAMES), cfg.MODEL.WEIGHTS, "the config")
        if names != list(cfg.MODEL.CLASS_NAMES):
            raise InputError(
                f"{cfg.MODEL.WEIGHTS} has the classes in the order {', '.join(names)}, but the "
                f"config in the order {', '.join(cfg.MODEL.CLASS_NAMES)}."
            )
    return fill(build_model(cfg).eval(), cfg, content)


def names_in(content: dict, weights: str) -> list[str]:
    """The names of the classes that a checkpoint knows, in the order of its outputs; may be []."""
    names = content.get("class_names")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        if names is None:
            return []
        raise InputError(f"{weights} has class_names that are no list of names: {names!r:.80}.")
    if len(set(names)) < len(names):
        raise InputError(f"{weights} has one of the class_names {', '.join(names)} twice.")
    return list(names)


def require_same_names(
    known: Sequence[str], wanted: Sequence[str], weights: str, where: str
) -> None:
    """Raise an InputError with both lists unless they are the same names, in any order."""
    if sorted(known) != sorted(wanted):
        raise InputError(
            f"{weights} knows the classes {', '.join(known)}, but {where} has "
            f"{', '.join(wanted) or 'none'}."
        )
