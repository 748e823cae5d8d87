"""What ends a training: losses that are not finite, and errors that do not say of which images."""

from __future__ import annotations

import functools

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from iou_d2.errors import DivergedError, InputError


def stop_at_non_finite_loss(model: nn.Module, inputs: tuple, losses: dict[str, Tensor]) -> None:
    """A forward hook: name the iteration, the losses and the images where a loss is not finite.

    `losses` are scalars. The device is waited for once, however many there are.
    """
    if not model.training or not losses:
        return
    values = torch.stack([loss.detach() for loss in losses.values()])
    if torch.isfinite(values).all():
        return
    is_finite = torch.isfinite(values).tolist()
    bad = {name: value for name, value, good in zip(losses, values.tolist(), is_finite) if not good}
    raise DivergedError(
        f"At iteration {_iteration()} the losses {bad} are not finite, {_of(inputs[0])}"
    )


def name_images_of_errors(model: nn.Module) -> None:
    """Let two errors that a model raises in training, before there are losses, name the images:
    the FloatingPointError of Detectron2's RPN, and the ValueError of batch norm, which has no
    statistics of a single value."""
    forward = model.forward

    @functools.wraps(forward)
    def named(batched_inputs, *args, **kwargs):
        try:
            return forward(batched_inputs, *args, **kwargs)
        except DivergedError:
            raise
        except FloatingPointError as error:
            raise DivergedError(
                f"At iteration {_iteration()} there are no losses: {error} It was "
                f"{_of(batched_inputs)}"
            ) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            sizes = [tuple(image["image"].shape[-2:]) for image in batched_inputs]
            raise InputError(
                f"The images of height and width {sizes} leave one value a channel, of which no "
                "layer can norm: raise INPUT.MIN_SIZE_TRAIN or MIN_SIZE_TEST."
            ) from error

    model.forward = named


def _iteration() -> int:
    return get_event_storage().iter


def _of(batched_inputs: list[dict]) -> str:
    images = [image.get("image_id", image.get("file_name")) for image in batched_inputs]
    return f"for the images with the ids {images}. A lower SOLVER.BASE_LR may help."
