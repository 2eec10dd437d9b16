"""Sets of points: their size, their distance, and the alignment of one to another. Numpy only.

Shape legend: B batch, N points, V and W points of two sets.
"""

from __future__ import annotations

import numpy as np


def box_side(point: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Longest side of the tight box around each sample's valid points; 0 where fewer than two are valid.

    Args: point [B, N, 2 or 3]; valid [B, N] 0 or 1. Returns: [B], in the unit of point.
    """
    mask = (valid > 0)[..., None]
    extent = np.where(mask, point, -np.inf).max(axis=1) - np.where(mask, point, np.inf).min(axis=1)
    return np.maximum(extent.max(axis=1), 0.0)  # -inf without a valid point


def align_procrustes(pred: np.ndarray, target: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Align `pred` to `target` by the similarity transform (rotation, scale, translation; no reflection) with the least
    squared error over valid points: Umeyama, "Least-squares estimation of transformation parameters", 1991.

    Args: pred, target [B, N, 3]; valid [B, N]. Returns: [B, N, 3], all points transformed; NaN for a sample with NaN or
    infinity in a valid point. A prediction collapsed into one point is only translated.
    """
    weight = (valid > 0)[..., None].astype(np.float64)
    pred_valid, target_valid = np.where(weight > 0, pred, 0.0), np.where(weight > 0, target, 0.0)
    finite = np.isfinite(pred_valid).all(axis=(1, 2)) & np.isfinite(target_valid).all(axis=(1, 2))
    keep = finite[:, None, None]
    pred_valid, target_valid = np.where(keep, pred_valid, 0.0), np.where(keep, target_valid, 0.0)

    count = np.maximum(weight.sum(axis=1, keepdims=True), 1.0)
    pred_mean = pred_valid.sum(axis=1, keepdims=True) / count
    target_mean = target_valid.sum(axis=1, keepdims=True) / count
    pred_centred = (pred_valid - pred_mean) * weight
    target_centred = (target_valid - target_mean) * weight

    covariance = np.swapaxes(target_centred, 1, 2) @ pred_centred
    left, singular, right = np.linalg.svd(covariance)
    sign = np.ones_like(singular)
    sign[:, 2] = np.where(np.linalg.det(left) * np.linalg.det(right) < 0, -1.0, 1.0)
    rotation = (left * sign[:, None, :]) @ right
    variance = np.square(pred_centred).sum(axis=(1, 2))
    scale = np.where(variance > 0, (singular * sign).sum(axis=1) / np.where(variance > 0, variance, 1.0), 1.0)
    with np.errstate(invalid="ignore"):
        aligned = scale[:, None, None] * (pred - pred_mean) @ np.swapaxes(rotation, 1, 2) + target_mean
    return np.where(keep, aligned, np.nan)


def nearest_squared(pred: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance of each point to the nearest point of the other set: [V, 3], [W, 3] -> [V], [W].

    |a - b|^2 = |a|^2 + |b|^2 - 2 a b is one matrix product; centred on the target it is exact to 1e-9 mm^2.
    """
    centre = target.mean(axis=0)
    pred, target = pred - centre, target - centre
    left = np.column_stack((pred, np.square(pred).sum(axis=1), np.ones(len(pred))))
    right = np.column_stack((-2.0 * target, np.ones(len(target)), np.square(target).sum(axis=1)))
    pair = left @ right.T
    return pair.min(axis=1), pair.min(axis=0)
