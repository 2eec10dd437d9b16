"""The mean hand of a training set: the baseline that has not looked at the picture."""

from __future__ import annotations

import numpy as np

from src.batch import NUM_JOINT
from src.data.dataset import HandDataset


def mean_hand(dataset: HandDataset, max_sample: int = 2000) -> np.ndarray | None:
    """Mean wrist-relative joints [21, 3] mm over the first positions of the training order, left hands mirrored.

    Reads annotations alone. None where no sample has 3D joints.
    """
    total, count = np.zeros((NUM_JOINT, 3)), np.zeros((NUM_JOINT, 1))
    for position in range(min(max_sample, dataset.plan.num_frame)):
        joint, valid = dataset.joints(position)
        total += (joint - joint[0]) * (valid * valid[0])[:, None]
        count += (valid * valid[0])[:, None]
    return total / np.maximum(count, 1) if count[0] > 0 else None
