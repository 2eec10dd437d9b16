"""The mean hand of a training set: the baseline that has not looked at the picture."""

from __future__ import annotations

import numpy as np

from src.batch import NUM_JOINT
from src.data.blob import SampleError
from src.data.dataset import HandDataset


def mean_hand(dataset: HandDataset, max_sample: int = 2000) -> np.ndarray | None:
    """Mean wrist-relative joints [21, 3] mm over the first positions of the training order, left hands mirrored.

    Decodes no image. None where no sample has 3D joints.
    """
    total, count = np.zeros((NUM_JOINT, 3)), np.zeros((NUM_JOINT, 1))
    for position in range(min(max_sample, len(dataset))):
        try:
            clip, number = dataset.annotation(dataset.plan.locate(position))
        except (SampleError, OSError):
            continue  # counted when training reads it
        valid = clip.joint_3d_valid[number] * clip.joint_3d_valid[number, 0]
        joint = clip.joint_cam[number] - clip.joint_cam[number, 0]
        side = 1.0 if clip.is_right else -1.0
        total += joint * (side, 1.0, 1.0) * valid[:, None]
        count += valid[:, None]
    return total / np.maximum(count, 1) if count[0] > 0 else None
