"""Validation: metrics and losses on the fixed validation sample, independent of workers, processes and batch size."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from src.batch import Batch, Prediction
from src.config import LossConfig
from src.data.mean_hand import MeanHand
from src.loss import LOSS_TERMS, loss_counts, loss_sums, loss_weights
from src.metric import SampleMetric, Samples, Target, align_procrustes, compare, predicted_points, target_points
from src.model.net import PoseNet
from src.utils.vis import overlay_sheet

VALIDATED = ("mpjpe_cam", "mpjpe_rel", "mpjpe_pa", "mpvpe_rel", "root_error")
# The metric that selects the `best` checkpoint: the first of these that the validation data has labels for.
KEY_METRICS = ("mpjpe_cam", "mpjpe_rel", "loss_total")


@torch.no_grad()
def evaluate(
    net: PoseNet,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    loss: LossConfig,
    mean_hand: MeanHand | None = None,
    draw: bool = True,
) -> tuple[dict[str, float], np.ndarray | None]:
    """Run the network over this process's share of the validation sample and gather the results of all processes.

    Args:
        net: the unwrapped network; its training mode is restored.
        mean_hand: the image-independent baseline; adds `<metric>_mean_hand`.
        draw: make an overlay sheet of the first batch.

    Returns:
        The metrics in mm and the loss terms that the data has labels for, equal on every process, with several data
        sets also as `<metric>/<data set>`; and on the main process the overlay sheet [H, W, 3] uint8.
    """
    was_training = net.training
    net.eval()
    parts, sheet = [], None
    for batch in batches:
        batch = batch.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            prediction = net(batch)
        if draw and sheet is None and accelerator.is_main_process:
            sheet = overlay_sheet(batch, prediction, net.hand.faces.cpu().numpy())
        parts.append(Samples.of_batch(batch, _sample_metrics(net, prediction, batch, mean_hand)))
    net.train(was_training)
    samples = Samples.join(gather_object(parts))
    metrics, weights = samples.means(), loss_weights(loss).double().tolist()
    total = sum(weight * metrics.get(name, 0.0) for name, weight in zip(LOSS_TERMS, weights, strict=True))
    return metrics | {"loss_total": total} | _by_source(samples), sheet


def _sample_metrics(
    net: PoseNet, prediction: Prediction, batch: Batch, mean_hand: MeanHand | None
) -> dict[str, SampleMetric]:
    target_rotmat = net.hand.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean)
    target = target_points(batch, net.hand(target_rotmat, batch.mano_shape).vert)
    values = compare(predicted_points(prediction, batch, target), target, VALIDATED)
    sums = loss_sums(prediction, batch, net.hand).double().cpu().numpy()
    counts = loss_counts(batch).double().cpu().numpy()
    for index, name in enumerate(LOSS_TERMS):
        values[name] = SampleMetric(sums[:, index], counts[:, index])
    return values if mean_hand is None else values | baseline_metrics(mean_hand, batch, target)


def baseline_metrics(mean: MeanHand, batch: Batch, target: dict[str, Target]) -> dict[str, SampleMetric]:
    """The metrics of the image-independent baseline as `<metric>_mean_hand`, except those without a baseline.

    Args: mean; batch; target: the batch's `target_points`.
    """
    camera = (value.double().cpu().numpy() for value in (batch.patch_focal, batch.patch_princpt))
    root = mean.root_cam(*camera, batch.patch.shape[-1])
    pred = {}
    if root is not None:
        pred["root"] = root[:, None]
    if root is not None and mean.joint_rel is not None:
        pred["joint_cam"] = root[:, None] + mean.joint_rel
    if mean.joint_rel is not None:
        pred["joint_rel"] = mean.joint_rel[None]
    if mean.joint_posed is not None:
        point, valid, *_ = target["joint_pa"]
        pred["joint_pa"] = align_procrustes(np.broadcast_to(mean.joint_posed, point.shape), point, valid)
    if mean.vert_rel is not None:
        pred["vert_rel"] = mean.vert_rel[None]
    return {f"{name}_mean_hand": value for name, value in compare(pred, target, VALIDATED).items()}


def _by_source(samples: Samples) -> dict[str, float]:
    """The metrics in mm of each data set, if there is more than one."""
    sources = sorted(set(samples.source))
    return {
        f"{name}/{source}": value
        for source in (sources if len(sources) > 1 else ())
        for name, value in samples.select(samples.source == source).means().items()
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


def key_metric(metrics: dict[str, float]) -> float:
    """The value that selects the `best` checkpoint; lower is better."""
    return next(metrics[name] for name in KEY_METRICS if name in metrics)
