"""The checkpoint of the best evaluation, model_best.pth, and when to stop for want of a better one.

Iterations are counted from 1 here: an evaluation "after 100" is that of the weights which
model_0000099.pth holds.
"""

from __future__ import annotations

import logging
import math
import os
import uuid

from detectron2.utils import comm

from .checkpoint import SafeCheckpointer
from .safe_load import peek_checkpoint

NAME = "model_best"


class BestCheckpoint:
    """Keeps the checkpoint of the highest box AP; of equal ones the earlier, and never one of NaN.

    Only the main process sees results, and so knows the best one.

    Attributes:
        ap: the highest box AP; None before there is one.
        iterations: after how many it was measured; 0 before there is one.
        stopped_after: iterations after which training ended because no better one came; or 0.
    """

    def __init__(self, checkpointer: SafeCheckpointer, dataset: str, period: int, patience: int):
        """
        Args:
            checkpointer: writes the file, which it does not take for the last checkpoint.
            dataset: of several test sets the one whose AP counts.
            period: iterations between two evaluations.
            patience: evaluations without a better AP before training stops; 0 for never.
        """
        self.checkpointer = checkpointer
        self.dataset = dataset
        self.period = period
        self.patience = patience
        self.ap: float | None = None
        self.iterations = 0
        self.stopped_after = 0
        # A file of an earlier training in the same folder is none of this one.
        self._run = uuid.uuid4().hex

    def see(self, results: dict, iterations: int) -> None:
        """Write the file where `results`, of Detectron2's `DefaultTrainer.test`, are the best."""
        ap = results.get(self.dataset, results).get("bbox", {}).get("AP", math.nan)
        if not math.isfinite(ap) or (self.ap is not None and ap <= self.ap):
            return
        self.ap, self.iterations = float(ap), iterations
        self.checkpointer.write(NAME, iteration=iterations - 1)
        logging.getLogger(__name__).info(
            f"{NAME}.pth is the checkpoint after {iterations} iterations, with box AP {ap:.3f}."
        )

    def is_over(self, iterations: int) -> bool:
        """Whether `patience` evaluations after the best one, of which the last is that after
        `iterations`, gave no better AP.

        Before the first AP that is a number there is nothing to better: Detectron2 has NaN as long
        as nothing is detected. Counted by iterations, since a checkpoint may be older than its
        evaluation.
        """
        if self.ap is None or self.patience == 0:
            return False
        return iterations - self.iterations >= self.patience * self.period

    def record(self) -> dict:
        """What run.json says: the best box AP and after how many iterations it was measured, and
        after how many training stopped early; None where there is none."""
        return {
            "best": {"AP": self.ap, "iterations": self.iterations} if self.iterations else None,
            "stopped_early_after": self.stopped_after or None,
        }

    def state_dict(self) -> dict:
        return {
            "run": self._run,
            "ap": self.ap,
            "iterations": self.iterations,
            "stopped_after": self.stopped_after,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from the state in a checkpoint and, in the main process, from that in the file of
        the best one, which may be younger."""
        self._run, self.stopped_after = state["run"], state["stopped_after"]
        self.ap, self.iterations = state["ap"], state["iterations"]
        path = os.path.join(self.checkpointer.save_dir, f"{NAME}.pth")
        if not comm.is_main_process() or not os.path.isfile(path):
            return
        best = peek_checkpoint(path).get("trainer", {}).get("best", {})
        if best.get("run") == self._run and (self.ap is None or best["ap"] > self.ap):
            self.ap, self.iterations = best["ap"], best["iterations"]
