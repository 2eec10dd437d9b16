"""Runs the network over the validation frames and keeps, sample by sample, what the tables and files are made of.

Shape legend: S samples, J = 21 joints, V vertices, K columns of a metric (1, 21 joints or 100 thresholds).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator

from src.batch import NUM_JOINT, Batch, Prediction
from src.evaluate.metrics import measure
from src.metric import SampleMetric
from src.model.net import PoseNet


@dataclass(frozen=True)
class Samples:
    """What was measured, one row a sample, in the order of the data."""

    position: np.ndarray  # [S] int: place in the data order
    key: list[str]
    source: np.ndarray  # [S] str: data set
    is_right: np.ndarray  # [S] bool
    metric: dict[str, SampleMetric]  # name -> totals [S, K], counts [S, K] or [S, 1]
    joint_cam: np.ndarray | None = None  # [S, J, 3] mm, camera of the photograph, own side; where asked for
    vert_cam: np.ndarray | None = None  # [S, V, 3]

    def __len__(self) -> int:
        return len(self.position)


@dataclass
class _Gathered:
    """Rows of the batches so far, padding left out."""

    key: list[str] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, name: str, value: np.ndarray) -> None:
        self.columns.setdefault(name, []).append(value)

    def column(self, name: str) -> np.ndarray:
        return np.concatenate(self.columns[name])


@torch.no_grad()
def collect(net: PoseNet, batches: Iterable[Batch], accelerator: Accelerator, keep_hands: bool = False) -> Samples:
    """Predict and measure every sample once.

    Args:
        net: in eval mode, on the accelerator's device.
        keep_hands: also keep the predicted joints and vertices in the cameras of the photographs.

    Raises:
        ValueError: the data hold not one frame that can be read.
    """
    assert not net.training
    gathered, metric_names = _Gathered(), []
    for batch in batches:
        batch = batch.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            prediction = net(batch)
        target = net.hand(net.hand.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean), batch.mano_shape)
        values = measure(prediction, batch, target.vert)
        metric_names = list(values)
        _add_rows(gathered, batch, values)
        if keep_hands:
            _add_hands(gathered, batch, prediction)
    if not gathered.key:
        raise ValueError("DATA.val.source: none of its frames can be read; script/check_shards.py names the damage")
    return Samples(
        position=gathered.column("position"),
        key=gathered.key,
        source=np.array(gathered.source, dtype=object),
        is_right=gathered.column("is_right"),
        metric={n: SampleMetric(gathered.column(f"{n} total"), gathered.column(f"{n} count")) for n in metric_names},
        joint_cam=gathered.column("joint_cam") if keep_hands else None,
        vert_cam=gathered.column("vert_cam") if keep_hands else None,
    )


def _add_rows(gathered: _Gathered, batch: Batch, values: dict[str, SampleMetric]) -> None:
    real = batch.position.cpu().numpy() >= 0
    gathered.key += [key for key, keep in zip(batch.key, real) if keep]
    gathered.source += [source for source, keep in zip(batch.source, real) if keep]
    gathered.add("position", batch.position.cpu().numpy()[real])
    gathered.add("is_right", batch.is_right.cpu().numpy()[real])
    for name, (total, count) in values.items():
        total, count = total.reshape(len(real), -1), count.reshape(len(real), -1)
        is_curve = total.shape[1] > NUM_JOINT  # whole numbers, and most of the memory
        gathered.add(f"{name} total", total[real].astype(np.float32 if is_curve else np.float64))
        gathered.add(f"{name} count", count[real])


def _add_hands(gathered: _Gathered, batch: Batch, prediction: Prediction) -> None:
    real = batch.position.cpu().numpy() >= 0
    for name in ("joint_cam", "vert_cam"):
        gathered.add(name, to_photograph(getattr(prediction, name), batch)[real])


def to_photograph(point: torch.Tensor, batch: Batch) -> np.ndarray:
    """From the patch camera, where every hand is a right one, to the camera of the photograph and the hand's own side.

    Args: point [B, N, 3] mm. Returns: [B, N, 3] mm float64.
    """
    back = batch.cam_rot.double().cpu().numpy()  # x_patch = R x, so x = x_patch R in rows
    turned = point.double().cpu().numpy() @ back
    side = np.where(batch.is_right.cpu().numpy(), 1.0, -1.0)[:, None]
    turned[:, :, 0] *= side
    return turned
