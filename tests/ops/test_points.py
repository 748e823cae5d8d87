from __future__ import annotations

import torch

from iou_d2.ops.points import PointGrid


def test_points_by_hand():
    features = [torch.zeros(2, 7, 2, 3), torch.zeros(2, 7, 1, 0)]
    first, second = PointGrid((8, 16), offset=0.5)(features)
    assert first.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    assert second.shape == (0, 2)
    (corner,) = PointGrid((128,), 0.0)([torch.zeros(1, 1, 2, 2, dtype=torch.float16)])
    assert corner.dtype == torch.float32
    assert corner.tolist() == [[0, 0], [128, 0], [0, 128], [128, 128]]
