"""Random COCO datasets with detections, for the tests of analysis and evaluation."""

from __future__ import annotations

import numpy as np


def make_random_coco(seed: int, images: int, classes: int, first_id: int = 1, score_steps: int = 0):
    """Objects of all sizes, a sixth of them crowds; detections near them and anywhere.

    `score_steps` quantises the scores, so that many of them tie. The ids of images, annotations and
    categories start at `first_id`.
    """
    rng = np.random.default_rng(seed)
    ground_truth = {
        "images": [
            {"id": first_id + i, "file_name": f"{i}.jpg", "height": 500, "width": 500}
            for i in range(images)
        ],
        "categories": [{"id": first_id + 2 * k, "name": f"class {k}"} for k in range(classes)],
        "annotations": [],
    }
    results = []
    for image in ground_truth["images"]:
        for _ in range(rng.integers(0, 6)):
            category = first_id + 2 * int(rng.integers(classes))
            box = _random_box(rng)
            ground_truth["annotations"].append(
                {
                    "id": first_id + len(ground_truth["annotations"]),
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3] * rng.uniform(0.4, 1)),
                    "iscrowd": int(rng.random() < 1 / 6),
                }
            )
            for _ in range(rng.integers(0, 4)):
                near = box + rng.normal(0, rng.uniform(0, 0.1), 4) * np.tile(box[2:], 2)
                near[2:] = near[2:].clip(1)
                results.append(_detection(rng, image["id"], category, near, score_steps))
        for _ in range(rng.integers(0, 3)):
            category = first_id + 2 * int(rng.integers(classes))
            results.append(_detection(rng, image["id"], category, _random_box(rng), score_steps))
    return ground_truth, results


def _random_box(rng) -> np.ndarray:
    return np.concatenate([rng.uniform(0, 200, 2), np.exp(rng.uniform(1.5, 5.6, 2))])


def _detection(rng, image_id, category_id, box, score_steps) -> dict:
    score = float(rng.random())
    if score_steps:
        score = round(score * score_steps) / score_steps
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box.tolist(),
        "score": score,
    }
