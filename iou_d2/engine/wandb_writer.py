"""The curves of a training on Weights & Biases, where that is installed: WANDB.PROJECT."""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from iou_d2.errors import InputError


def check_wandb(cfg: CfgNode) -> None:
    """Raises InputError: WANDB.PROJECT is set, and the package wandb is not installed."""
    if cfg.WANDB.PROJECT and find_spec("wandb") is None:
        raise InputError(
            f"WANDB.PROJECT is {cfg.WANDB.PROJECT}, which needs the package wandb: `pip install "
            "wandb`."
        )


def wandb_writers(cfg: CfgNode) -> list[EventWriter]:
    """The writer that WANDB.PROJECT asks for, or none."""
    return [WandbWriter(cfg)] if cfg.WANDB.PROJECT else []


class WandbWriter(EventWriter):
    """Logs what metrics.json gets: losses, learning rate and times, medians over 20 iterations, and
    the figures of each evaluation, with the config beside them.

    wandb itself is told by its environment variables: WANDB_MODE offline, WANDB_ENTITY, and for a
    training that is resumed WANDB_RUN_ID with WANDB_RESUME allow.
    """

    def __init__(self, cfg: CfgNode, window_size: int = 20):
        """Raises InputError: wandb does not start, such as without an account."""
        import wandb

        try:
            self._run = wandb.init(
                project=cfg.WANDB.PROJECT,
                name=Path(cfg.OUTPUT_DIR).resolve().name,
                dir=cfg.OUTPUT_DIR,
                config=yaml.safe_load(cfg.dump()),
            )
        except wandb.Error as error:
            raise InputError(f"Weights & Biases does not start: {error}") from error
        self._window_size = window_size
        self._last = -1

    def write(self) -> None:
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        values = defaultdict(dict)
        for name, (value, iteration) in latest.items():
            if iteration > self._last:
                values[iteration][name] = value
        for iteration in sorted(values):  # steps never fall
            self._run.log(values[iteration], step=iteration)
            self._last = iteration

    def close(self) -> None:
        self._run.finish()
