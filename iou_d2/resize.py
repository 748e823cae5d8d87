"""Detectron2's resize, for images of any shape."""

from __future__ import annotations

from detectron2.data import transforms as T


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's ResizeShortestEdge with sides of at least 1 px: of an image of 3 x 5000 px that
    is scaled to a longest side of 640 it would leave no row."""

    @classmethod
    def like(cls, resize: T.ResizeShortestEdge) -> ResizeShortestEdge:
        """One that does what `resize` does."""
        style = "range" if resize.is_range else "choice"
        return cls(resize.short_edge_length, resize.max_size, style, resize.interp)

    def get_transform(self, image) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


def for_any_shape(augmentation: T.Augmentation) -> T.Augmentation:
    """`augmentation`, or in place of Detectron2's ResizeShortestEdge one like it."""
    if type(augmentation) is T.ResizeShortestEdge:
        return ResizeShortestEdge.like(augmentation)
    return augmentation
