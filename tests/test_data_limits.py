"""Finite but absurd numbers count as corrupt; numbers within the limits give finite batches."""

from __future__ import annotations

import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.data.loader import build_train_loader
from src.data.shards.annotation import MIN_FOCAL, VALUE_LIMIT
from src.data.shards.build_index import build_index
from tests.data_shards import data_config, lab_sample, native_sample, write_shard

REASON = {
    "hand_bbox": "bad_bbox",
    "joint_img": "bad_value",
    "joint_cam": "bad_value",
    "mano_pose": "bad_value",
    "mano_shape": "bad_value",
    "focal": "bad_intrinsics",
    "princpt": "bad_intrinsics",
}


def with_value(sample: dict[str, Any], name: str, value: float, frame: int = 0) -> dict[str, Any]:
    """The sample with `value` as the last number of a frame."""
    array = sample[f"{name}.npy"].copy()
    array[frame].flat[-1] = value
    return {**sample, f"{name}.npy": array}


@pytest.mark.parametrize("value", [3e38, -3e38, 1.01 * VALUE_LIMIT, -1.01 * VALUE_LIMIT])
@pytest.mark.parametrize("name", REASON)
def test_a_number_beyond_the_limit_makes_its_frame_bad(tmp_path: Path, name: str, value: float) -> None:
    clip = with_value(native_sample(0, 3), name, value, frame=1)
    index = build_index(write_shard(tmp_path / "a.tar", [clip]))
    assert index.bad_count == {REASON[name]: 1}
    assert [bad.key for bad in index.bad] == ["00000/1"]
    assert index.num_frame() == 2


@pytest.mark.parametrize("intr_type", ["real", "fixed_virtual"])
@pytest.mark.parametrize("focal", [1e-30, 0.99 * MIN_FOCAL, -500.0])
def test_a_focal_length_below_the_limit(tmp_path: Path, focal: float, intr_type: str) -> None:
    sample = with_value(native_sample(0, has_intr=1, intr_type=intr_type), "focal", focal)
    assert build_index(write_shard(tmp_path / "a.tar", [sample])).bad_count == {"bad_intrinsics": 1}


def test_values_flagged_as_unknown_may_be_anything(tmp_path: Path) -> None:
    flags = {"joint_2d_valid": (2, 21), "joint_3d_valid": (2, 21), "has_mano": (2,), "has_intr": (2,)}
    sample = lab_sample(0, 2, 2) | {f"{name}.npy": np.zeros(shape, np.float32) for name, shape in flags.items()}
    for name in REASON.keys() - {"hand_bbox"}:
        sample = with_value(sample, name, 3e38)
    index = build_index(write_shard(tmp_path / "a.tar", [sample]))
    assert (index.bad_count, index.num_frame()) == ({}, 2)


def test_numbers_at_the_limits_give_finite_batches(tmp_path: Path) -> None:
    far = np.float32(VALUE_LIMIT)
    boxes, focals = ((-far, -far, far, far), (0, 0, 1, 1)), (MIN_FOCAL, 100.0, far)
    samples = []
    for box, focal, center in product(boxes, product(focals, focals), (-far, 0, far)):
        sample = native_sample(len(samples))
        extreme = {"hand_bbox.npy": np.float32([box]), "focal.npy": np.float32([focal])}
        extreme["princpt.npy"] = np.float32([[center, -center]])
        for name in ("joint_img", "joint_cam", "mano_pose", "mano_shape"):
            extreme[f"{name}.npy"] = far * np.sign(sample[f"{name}.npy"])
        samples.append(sample | extreme)
    write_shard(tmp_path / "train" / "0.tar", samples)
    loader = build_train_loader(data_config(tmp_path, sample_per_device=6), "mano", num_batch=18)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        batches = list(loader)
    assert loader.health.counts() == {}
    for batch in batches:
        for name, value in vars(batch).items():
            assert not torch.is_tensor(value) or value.isfinite().all(), name
