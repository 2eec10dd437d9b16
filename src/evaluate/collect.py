"""Run the network over the validation frames and keep the results of each sample.

Shape legend: B batch, N points (21 joints or V vertices).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from accelerate import Accelerator

from src.batch import Batch
from src.metric import Samples, measure
from src.model.net import PoseNet


@torch.no_grad()
def collect(net: PoseNet, batches: Iterable[Batch], accelerator: Accelerator, keep_hands: bool = False) -> Samples:
    """Predict and measure every sample once.

    Args:
        net: in eval mode, on the accelerator's device.
        keep_hands: also keep the predicted joints and vertices in the cameras of the source images.

    Raises:
        ValueError: no frame of the data can be read.
    """
    assert not net.training
    parts = []
    for batch in batches:
        batch = batch.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            prediction = net(batch)
        target = net.hand(net.hand.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean), batch.mano_shape)
        hands = {}
        if keep_hands:
            hands = {name: to_source_camera(getattr(prediction, name), batch) for name in ("joint_cam", "vert_cam")}
        parts.append(Samples.of_batch(batch, measure(prediction, batch, target.vert), **hands))
    if not any(len(part) for part in parts):
        raise ValueError(
            "DATA.val.source: none of its frames can be read; script/check_shards.py lists what is corrupt"
        )
    return Samples.join(parts)


def to_source_camera(point: torch.Tensor, batch: Batch) -> np.ndarray:
    """Map points from the patch camera, where every hand is a right hand, to the source camera and the original side.

    Args: point [B, N, 3] mm. Returns: [B, N, 3] mm float64.
    """
    rotation = batch.cam_rot.double().cpu().numpy()  # x_patch = R x, so with rows x = x_patch R
    turned = point.double().cpu().numpy() @ rotation
    turned[:, :, 0] *= np.where(batch.is_right.cpu().numpy(), 1.0, -1.0)[:, None]
    return turned
