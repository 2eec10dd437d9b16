"""Sheets of the worst and of random hands: target, prediction, and both from the side, where depth errors are visible.

Hands are shown as in the source image: patches of left hands, mirrored for the network, are mirrored back.
Images are uint8 RGB; S samples.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from accelerate import Accelerator

from src.batch import Batch, Prediction
from src.data.dataset import HandDataset
from src.data.loader import collate
from src.hand.skeleton import BONES
from src.metric import Samples
from src.model.net import PoseNet
from src.utils.vis import draw_skeleton, tile

# samples are ranked by the first of these that the data has labels for
RANKED_BY = {
    "mpjpe_rel": ("root-relative MPJPE", "mm"),
    "mpjpe_pa": ("PA-MPJPE", "mm"),
    "mpjpe_cam": ("camera MPJPE", "mm"),
    "error_2d": ("2D error", "px"),
}
_SIDE, _NUM_COLUMN, _TITLE, _CAPTION = 176, 4, 30, 34
_REACH_MM = 160.0  # half of a side panel
_TARGET_RGB, _INK, _PAPER = (120, 120, 120), (235, 235, 235), (24, 24, 24)


def ranking(samples: Samples) -> tuple[str, np.ndarray]:
    """(metric, error [S] of each sample); the error is -1 without labels and infinite if the prediction is NaN."""
    name = next((n for n in RANKED_BY if samples.metric[n].count.sum() > 0), "error_2d")
    total, count = (part[:, 0] for part in samples.metric[name])
    error = np.where(count > 0, total / np.maximum(count, 1), -1.0)
    return name, np.where(np.isnan(error), np.inf, error)


def choose(error: np.ndarray, num: int, seed: int) -> dict[str, np.ndarray]:
    """The rows of the `num` worst samples, worst first, and of random samples, among those with labels."""
    known = np.flatnonzero(error >= 0)
    worst = known[np.argsort(-error[known], kind="stable")][:num]
    drawn = np.random.default_rng(seed).permutation(known)[:num]
    return {"worst": worst, "random": np.sort(drawn)}


@torch.no_grad()
def sheet(
    net: PoseNet, dataset: HandDataset, accelerator: Accelerator, samples: Samples, rows: np.ndarray, title: str
) -> np.ndarray:
    """Draw the samples `rows`, which are read and predicted again. Returns: [H, W, 3]."""
    name, error = ranking(samples)
    batch, _ = collate(dataset.__getitems__([int(samples.position[row]) for row in rows]))
    batch = batch.to(accelerator.device)
    with accelerator.autocast():
        prediction = net(batch)
    label, unit = RANKED_BY[name]
    captions = [f"{error[row]:.1f} {unit}" for row in rows]
    images = [_hand(batch, prediction, index, caption) for index, caption in enumerate(captions)]
    body = tile(images, min(_NUM_COLUMN, len(images)))
    head = np.full((_TITLE, body.shape[1], 3), _PAPER, np.uint8)
    text = f"{title}; numbers: {label}. Each: target | prediction | side view (farther is right), target grey"
    _write(head, text, (8, 20), 0.5 if body.shape[1] > 1000 else 0.32)
    return np.concatenate([head, body])


def _hand(batch: Batch, prediction: Prediction, index: int, caption: str) -> np.ndarray:
    """Three panels side by side above a caption of two lines."""
    is_right = bool(batch.is_right[index])
    patch = batch.patch[index].permute(1, 2, 0).cpu().numpy()
    scale = _SIDE / patch.shape[0]
    patch = cv2.resize(patch if is_right else patch[:, ::-1], (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR)

    def place(joint: torch.Tensor) -> np.ndarray:
        point = (joint[index].detach().double().cpu().numpy() + 0.5) * scale - 0.5
        return point if is_right else np.stack([_SIDE - 1 - point[:, 0], point[:, 1]], axis=1)

    target = draw_skeleton(patch, place(batch.joint_patch), batch.joint_2d_valid[index].cpu().numpy())
    guess = draw_skeleton(patch, place(prediction.joint_patch))
    panels = np.concatenate([target, guess, _side_view(batch, prediction, index)], axis=1)
    foot = np.full((_CAPTION, panels.shape[1], 3), _PAPER, np.uint8)
    _write(foot, f"{caption}, {'right' if is_right else 'left'}, {batch.source[index]}", (6, 13), 0.4)
    _write(foot, batch.key[index][-72:], (6, 28), 0.34)
    border = np.full((panels.shape[0] + _CAPTION, 6, 3), _PAPER, np.uint8)
    return np.concatenate([np.concatenate([panels, foot]), border], axis=1)


def _side_view(batch: Batch, prediction: Prediction, index: int) -> np.ndarray:
    """Side view along the x axis of both hands, relative to their wrists: depth to the right, y down."""
    canvas = np.full((_SIDE, _SIDE, 3), _PAPER, np.uint8)

    def place(joint: torch.Tensor) -> np.ndarray:
        point = joint[index].detach().double().cpu().numpy()
        return (point - point[0])[:, [2, 1]] * (0.5 * _SIDE / _REACH_MM) + 0.5 * _SIDE

    valid = batch.joint_3d_valid[index].cpu().numpy()
    if valid[0]:
        _draw_grey(canvas, place(batch.joint_cam), valid)
    return draw_skeleton(canvas, place(prediction.joint_cam))


def _draw_grey(canvas: np.ndarray, point: np.ndarray, valid: np.ndarray) -> None:
    for parent, child in BONES:
        if valid[parent] and valid[child]:
            ends = np.clip(np.round(point[[parent, child]] * 16), -(2**20), 2**20).astype(int).tolist()
            cv2.line(canvas, *ends, _TARGET_RGB, 3, cv2.LINE_AA, 4)


def _write(image: np.ndarray, text: str, origin: tuple[int, int], size: float) -> None:
    cv2.putText(image, text, origin, cv2.FONT_HERSHEY_SIMPLEX, size, _INK, 1, cv2.LINE_AA)
