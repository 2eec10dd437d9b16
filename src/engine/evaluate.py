"""Validation: the metrics and losses of the fixed sample, one number whatever the workers, processes or batches.

Shapes: B batch, J = 21 joints, V vertices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from src.batch import Batch, Prediction
from src.config import LossConfig
from src.loss import LOSS_TERMS, loss_counts, loss_sums, loss_weights
from src.metric import MetricAccumulator, SampleMetric, evaluate_batch, point_error
from src.model.net import PoseNet
from src.utils.vis import overlay_sheet

# What decides which checkpoint is `best`: the first of these that the validation data can answer.
KEY_METRICS = ("mpjpe_cam", "mpjpe_rel", "loss_total")


@dataclass
class Validation:
    """Result of one validation, equal on every process."""

    # mm, and the loss terms; what the data cannot answer is absent. With several data sets also `<metric>/<data set>`.
    metrics: dict[str, float]
    sheet: np.ndarray | None  # [H, W, 3] uint8 overlay of the first batch, on the main process


@torch.no_grad()
def evaluate(
    net: PoseNet,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    loss: LossConfig,
    mean_hand: np.ndarray | None = None,
    draw: bool = True,
) -> Validation:
    """Run the network over this process's share of the validation sample and join the shares.

    Args:
        net: the bare network; left in the mode it came in.
        mean_hand: [J, 3] mm, the baseline's answer; adds `mpjpe_rel_mean_hand`.
        draw: make an overlay sheet of the first batch.
    """
    was_training = net.training
    net.eval()
    gathered, sheet = MetricAccumulator(), None
    for batch in batches:
        batch = batch.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            prediction = net(batch)
        if draw and sheet is None and accelerator.is_main_process:
            sheet = overlay_sheet(batch, prediction)
        gathered.update(batch.position.cpu().numpy(), batch.source, _sample_metrics(net, prediction, batch, mean_hand))
    net.train(was_training)
    everyone = MetricAccumulator()
    for state in gather_object([gathered.state()]):
        everyone.merge(state)
    return Validation(_with_total(everyone.compute(), loss) | _by_source(everyone), sheet)


def _sample_metrics(
    net: PoseNet, prediction: Prediction, batch: Batch, mean_hand: np.ndarray | None
) -> dict[str, SampleMetric]:
    target_rotmat = net.hand.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean)
    values = evaluate_batch(prediction, batch, net.hand(target_rotmat, batch.mano_shape).vert)
    sums = loss_sums(prediction, batch, net.hand).double().cpu().numpy()
    counts = loss_counts(batch).double().cpu().numpy()
    for index, name in enumerate(LOSS_TERMS):
        values[name] = SampleMetric(sums[:, index], counts[:, index])
    if mean_hand is not None:
        values["mpjpe_rel_mean_hand"] = mean_hand_error(mean_hand, batch)
    return values


def mean_hand_error(mean_hand: np.ndarray, batch: Batch) -> SampleMetric:
    """Root-relative error of always answering `mean_hand` [J, 3] mm: what a network gains by looking at the picture."""
    joint = batch.joint_cam.double().cpu().numpy()
    valid = batch.joint_3d_valid.cpu().numpy()
    return point_error(mean_hand[None], joint - joint[:, :1], valid * valid[:, :1])


def _by_source(gathered: MetricAccumulator) -> dict[str, float]:
    """The metrics in mm of each data set, where there is more than one."""
    sources = gathered.sources()
    return {
        f"{name}/{source}": value
        for source in (sources if len(sources) > 1 else ())
        for name, value in gathered.compute(source).items()
        if name not in LOSS_TERMS
    }


def describe(metrics: dict[str, float]) -> str:
    """The metrics for the log: those of all samples, then a line for each data set."""
    lines: dict[str, list[str]] = {"": []}
    in_mm = {name: value for name, value in metrics.items() if not name.startswith("loss")}
    for key, value in (in_mm or metrics).items():
        name, _, source = key.partition("/")
        lines.setdefault(source, []).append(f"{name}={value:.2f}")
    return "\n".join(f"  {source}: {' '.join(parts)}" if source else " ".join(parts) for source, parts in lines.items())


def _with_total(metrics: dict[str, float], loss: LossConfig) -> dict[str, float]:
    """Add `loss_total`, weighted as in training."""
    weights = loss_weights(loss).double().tolist()
    total = sum(weight * metrics.get(name, 0.0) for name, weight in zip(LOSS_TERMS, weights, strict=True))
    return metrics | {"loss_total": total}


def key_metric(metrics: dict[str, float]) -> float:
    """The value that decides which checkpoint is `best`; lower is better."""
    return next(metrics[name] for name in KEY_METRICS if name in metrics)
