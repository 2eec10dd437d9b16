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
from src.data.mean_hand import MeanHand
from src.loss import LOSS_TERMS, loss_counts, loss_sums, loss_weights
from src.metric import MetricAccumulator, SampleMetric, evaluate_batch, point_error, procrustes_error
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
    mean_hand: MeanHand | None = None,
    draw: bool = True,
) -> Validation:
    """Run the network over this process's share of the validation sample and join the shares.

    Args:
        net: the bare network; left in the mode it came in.
        mean_hand: the image-independent baseline; adds `<metric>_mean_hand` for each of its answers.
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
            sheet = overlay_sheet(batch, prediction, net.hand.faces.cpu().numpy())
        gathered.update(batch.position.cpu().numpy(), batch.source, _sample_metrics(net, prediction, batch, mean_hand))
    net.train(was_training)
    everyone = MetricAccumulator()
    for state in gather_object([gathered.state()]):
        everyone.merge(state)
    return Validation(_with_total(everyone.compute(), loss) | _by_source(everyone), sheet)


def _sample_metrics(
    net: PoseNet, prediction: Prediction, batch: Batch, mean_hand: MeanHand | None
) -> dict[str, SampleMetric]:
    target_rotmat = net.hand.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean)
    target_vert = net.hand(target_rotmat, batch.mano_shape).vert
    values = evaluate_batch(prediction, batch, target_vert)
    sums = loss_sums(prediction, batch, net.hand).double().cpu().numpy()
    counts = loss_counts(batch).double().cpu().numpy()
    for index, name in enumerate(LOSS_TERMS):
        values[name] = SampleMetric(sums[:, index], counts[:, index])
    return values if mean_hand is None else values | constant_metrics(mean_hand, batch, target_vert)


def constant_metrics(mean: MeanHand, batch: Batch, target_vert: torch.Tensor) -> dict[str, SampleMetric]:
    """The metrics of the image-independent baseline, as `<metric>_mean_hand`: what a network gains by looking at the
    image is the distance to them. Without those that `mean` has no answer for; target_vert as in `evaluate_batch`."""
    target = batch.joint_cam.double().cpu().numpy()
    valid = batch.joint_3d_valid.cpu().numpy()
    has_intr = batch.has_intr.cpu().numpy()[:, None]
    camera = (value.double().cpu().numpy() for value in (batch.patch_focal, batch.patch_princpt))
    root = mean.root_cam(*camera, batch.patch.shape[-1])
    values = {}
    if root is not None and mean.joint_rel is not None:
        values["mpjpe_cam"] = point_error(root[:, None] + mean.joint_rel, target, valid * has_intr)
    if mean.joint_rel is not None:
        values["mpjpe_rel"] = point_error(mean.joint_rel[None], target - target[:, :1], valid * valid[:, :1])
    if mean.joint_posed is not None:
        values["mpjpe_pa"] = procrustes_error(np.broadcast_to(mean.joint_posed, target.shape), target, valid)
    if mean.vert_rel is not None:
        has_mano = np.broadcast_to(batch.has_mano.cpu().numpy()[:, None], target_vert.shape[:2])
        values["mpvpe_rel"] = point_error(mean.vert_rel[None], target_vert.double().cpu().numpy(), has_mano)
    if root is not None:
        values["root_error"] = point_error(root[:, None], target[:, :1], valid[:, :1] * has_intr)
    return {f"{name}_mean_hand": value for name, value in values.items()}


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
