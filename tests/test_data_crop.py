"""The crop keeps image, 2D, 3D, MANO root and camera consistent, for both hands and any augmentation."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.batch import Sample
from src.data.augment import (
    NUM_UNIFORM,
    Augmentation,
    PixelAugmentation,
    augment_pixels,
    draw_augmentation,
)
from src.data.crop import crop_samples, empty_batch, pad_rows, patch_labels
from src.data.rng import uniforms
from src.geometry.patch import PatchView, mirror_pose, warp_image
from src.geometry.rotation import axis_angle_to_matrix
from src.hand.mano import ManoLayer
from src.hand.standin.build import build_standin_hand

KNOBS = SimpleNamespace(
    rot_max=180.0,
    persp_rot_max=30.0,
    scale_z_range=[0.7, 1.4],
    scale_f_range=[0.9, 1.1],
    shift_max=0.2,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    noise_std=5.0,
    blur_max=1.5,
    occlusion_prob=0.5,
)
OFF = SimpleNamespace(**{name: [1.0, 1.0] if "range" in name else 0.0 for name in vars(KNOBS)})


@pytest.fixture(scope="module")
def hand() -> ManoLayer:
    return ManoLayer(build_standin_hand()).double()


def joints_of(hand: ManoLayer, pose: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """[21, 3] mm of a right hand with its wrist at the origin."""
    rotmat = axis_angle_to_matrix(torch.from_numpy(pose).double().reshape(1, 16, 3))
    joint = hand(rotmat, torch.from_numpy(shape).double()[None]).joint[0].numpy()
    return joint - joint[0]


def make_sample(hand: ManoLayer, seed: int, is_right: bool) -> Sample:
    """A consistent hand: 3D joints from its pose, 2D joints projected by a camera with fx != fy."""
    rng = np.random.default_rng(seed)
    width, height = int(rng.integers(200, 700)), int(rng.integers(200, 700))
    pose, shape = rng.normal(0, 0.4, 48), rng.normal(0, 1, 10)
    pose[:3] = rng.normal(0, 2, 3)
    focal = rng.uniform(0.8, 2.0) * max(width, height) * rng.uniform(0.9, 1.1, 2)
    princpt = np.array([width, height]) * rng.uniform(0.35, 0.65, 2)
    depth = rng.uniform(350, 900)
    wrist = np.append((np.array([width, height]) * rng.uniform(0.2, 0.8, 2) - princpt) / focal * depth, depth)
    joint_cam = joints_of(hand, pose, shape)
    if not is_right:  # mirror both the joints and the pose
        joint_cam, pose = joint_cam * (-1, 1, 1), mirror_pose(pose)
    joint_cam = joint_cam + wrist
    joint_img = joint_cam[:, :2] / joint_cam[:, 2:] * focal + princpt
    box = np.concatenate([joint_img.min(axis=0), joint_img.max(axis=0)])
    data = {"hand_bbox": box, "joint_img": joint_img, "joint_cam": joint_cam, "mano_pose": pose, "mano_shape": shape}
    data |= {"focal": focal, "princpt": princpt, "joint_2d_valid": np.ones(21), "joint_3d_valid": np.ones(21)}
    return Sample(
        key="k/0",
        source="test",
        image=np.zeros((height, width, 3), np.uint8),
        is_right=is_right,
        has_mano=True,
        flat_hand_mean=True,
        has_intr=True,
        **{name: value.astype(np.float32) for name, value in data.items()},
    )


def crop(sample: Sample, augmentation: Augmentation, img_size: int, expansion_ratio: float) -> SimpleNamespace:
    """One sample cropped: the fields of a Batch without the leading B."""
    batch = crop_samples([sample], [augmentation], img_size, expansion_ratio)
    return SimpleNamespace(**{name: value[0] for name, value in vars(batch).items()})


def view_of(sample: Sample, augmentation: Augmentation, img_size: int, expansion_ratio: float) -> PatchView:
    """The patch camera of a sample."""
    return patch_labels([sample], [augmentation], img_size, expansion_ratio)[1][0]


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), is_right=st.booleans(), augment=st.booleans())
def test_image_2d_3d_and_mano_stay_consistent(hand: ManoLayer, seed: int, is_right: bool, augment: bool) -> None:
    sample = make_sample(hand, seed, is_right)
    augmentation = draw_augmentation(uniforms("test", seed, num=NUM_UNIFORM), KNOBS) if augment else Augmentation()
    view = view_of(sample, augmentation, 64, 2.0)
    row = crop(sample, augmentation, 64, 2.0)
    projected = row.joint_cam[:, :2] / row.joint_cam[:, 2:] * row.patch_focal + row.patch_princpt
    inside = np.abs(row.joint_patch).max(axis=-1) < 640  # float32 is imprecise far outside the patch
    assert np.abs(projected - row.joint_patch)[inside].max(initial=0) < 0.1
    relative = joints_of(hand, row.mano_pose, row.mano_shape)
    assert np.abs(relative - (row.joint_cam - row.joint_cam[0])).max() < 0.1
    back = row.joint_cam @ row.cam_rot * (1 if is_right else -1, 1, 1)
    assert np.abs(back - sample.joint_cam).max() < 0.05
    assert np.allclose(row.cam_rot @ row.cam_rot.T, np.eye(3), atol=1e-5)
    assert np.linalg.det(row.cam_rot) == pytest.approx(1, abs=1e-5)
    source = np.concatenate([sample.joint_img, np.ones((21, 1))], axis=1) @ view.image_to_patch.T
    assert np.abs(source[:, :2] / source[:, 2:] - row.joint_patch)[inside].max(initial=0) < 0.05
    if not augment:
        assert (row.cam_rot == np.eye(3)).all()
        center = 0.5 * (row.joint_patch.min(axis=0) + row.joint_patch.max(axis=0))
        assert np.allclose(center, 31.5, atol=0.1)
        assert np.ptp(row.joint_patch, axis=0).max() == pytest.approx(32, rel=1e-3)  # also where fx != fy


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("expansion", [1.2, 6.0])  # enlarged, and shrunk
def test_pixels_move_with_the_joints(hand: ManoLayer, is_right: bool, expansion: float) -> None:
    for seed in range(8):
        sample = make_sample(hand, seed, is_right)
        yy, xx = np.mgrid[: sample.image.shape[0], : sample.image.shape[1]]
        x, y = sample.joint_img[5]
        dot = 255 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 2 / 8**2)
        sample = dataclasses.replace(sample, image=np.repeat(dot[..., None], 3, axis=2).astype(np.uint8))
        geometry = dataclasses.replace(
            draw_augmentation(uniforms("test", seed, num=NUM_UNIFORM), KNOBS), pixel=PixelAugmentation()
        )
        view = view_of(sample, geometry, 128, expansion)
        row = crop(sample, geometry, 128, expansion)
        if not ((row.joint_patch[5] > 25) & (row.joint_patch[5] < 103)).all():
            continue
        inside = warp_image(np.full_like(sample.image, 255), view, 128)[..., 2] > 250  # the border is grey
        weight = np.where(inside, row.patch[0].astype(float), 0.0)
        py, px = np.mgrid[:128, :128]
        center = np.array([(px * weight).sum(), (py * weight).sum()]) / weight.sum()
        assert np.abs(center - row.joint_patch[5]).max() < 1.0


def test_downscaling_averages_pixels(hand: ManoLayer) -> None:
    sample = make_sample(hand, 1, True)
    checker = np.indices((800, 800)).sum(axis=0) % 2 * 255
    sample = dataclasses.replace(
        sample,
        image=np.repeat(checker[..., None], 3, axis=2).astype(np.uint8),
        hand_bbox=np.array([200, 200, 600, 600], np.float32),
    )
    patch = crop(sample, Augmentation(), 50, 1.5).patch
    assert patch[:, 5:-5, 5:-5].std() < 8
    assert patch[:, 5:-5, 5:-5].mean() == pytest.approx(127.5, abs=3)


def test_unknown_values_stay_zero(hand: ManoLayer) -> None:
    sample = dataclasses.replace(
        make_sample(hand, 2, False),
        has_mano=False,
        joint_2d_valid=np.zeros(21, np.float32),
        joint_3d_valid=np.zeros(21, np.float32),
    )
    row = crop(sample, draw_augmentation(uniforms("test", 2, num=NUM_UNIFORM), KNOBS), 32, 2.0)
    for name in ("joint_patch", "joint_cam", "mano_pose", "mano_shape", "joint_2d_valid", "joint_3d_valid"):
        assert not getattr(row, name).any()


def test_padding_rows_are_finite_and_have_no_labels() -> None:
    batch = empty_batch(3, 32)
    for value in vars(batch).values():
        if isinstance(value, np.ndarray):
            value.fill(np.nan if value.dtype == np.float32 else 1)
    pad_rows(batch, [0, 2])
    padding = {name: value[[0, 2]] for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
    assert all(np.isfinite(value).all() for value in padding.values())
    assert (padding["position"] == -1).all()
    for name in ("joint_2d_valid", "joint_3d_valid", "has_mano", "has_intr"):
        assert not padding[name].any()
    assert np.isnan(batch.joint_cam[1]).all()  # other rows are untouched


def test_augmentation_is_a_function_of_its_stream() -> None:
    assert draw_augmentation(uniforms("augment", 1, 2, num=NUM_UNIFORM), KNOBS) == draw_augmentation(
        uniforms("augment", 1, 2, num=NUM_UNIFORM), KNOBS
    )
    draws = {
        draw_augmentation(uniforms("augment", *seed, num=NUM_UNIFORM), KNOBS).roll
        for seed in ((1, 2), (1, 2, 0), (2, 1), (1, 2 << 32))
    }
    assert len(draws) == 4
    one_knob = SimpleNamespace(**{**vars(KNOBS), "noise_std": 0.0})
    changed = draw_augmentation(uniforms("augment", 1, 2, num=NUM_UNIFORM), one_knob)
    assert changed.roll == draw_augmentation(uniforms("augment", 1, 2, num=NUM_UNIFORM), KNOBS).roll


def test_knobs_at_zero_change_no_pixel() -> None:
    patch = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    off = draw_augmentation(uniforms("augment", 5, num=NUM_UNIFORM), OFF)
    assert (off.roll, off.tilt, off.zoom, off.shift) == (0.0, (0.0, 0.0), 1.0, (0.0, 0.0))
    assert augment_pixels(patch, off.pixel) is patch


def test_each_pixel_augmentation_has_its_effect() -> None:
    patch = np.full((64, 64, 3), (200, 100, 50), np.uint8)
    keep = patch.copy()
    grey = augment_pixels(patch, PixelAugmentation(saturation=0.0))
    assert np.ptp(grey) <= 1
    assert grey[0, 0, 0] == pytest.approx(0.299 * 200 + 0.587 * 100 + 0.114 * 50, abs=1)
    assert augment_pixels(patch, PixelAugmentation(brightness=1.5))[0, 0].tolist() == [255, 150, 75]
    assert augment_pixels(patch, PixelAugmentation(contrast=0.0))[0, 0].tolist() == [128] * 3
    noisy = augment_pixels(patch, PixelAugmentation(noise_std=6.0, noise_offset=0.3)).astype(float) - patch
    assert noisy.std() == pytest.approx(6, rel=0.1)
    assert abs(noisy.mean()) < 0.3
    pixel = draw_augmentation(
        uniforms("occlude", 3, num=NUM_UNIFORM), SimpleNamespace(**{**vars(OFF), "occlusion_prob": 1.0})
    ).pixel
    covered = (augment_pixels(patch, pixel) != patch).any(axis=-1).mean()
    assert 0.01 <= covered <= 0.21
    assert (patch == keep).all()


def test_a_tilt_that_leaves_the_scene_is_dropped(hand: ManoLayer) -> None:
    sample = make_sample(hand, 3, True)
    view = view_of(sample, Augmentation(roll=0.3, tilt=(1.4, 0.0)), 64, 2.0)
    assert view.cam_rot[2, 2] == 1.0
    assert cv2.Rodrigues(view.cam_rot)[0][2, 0] == pytest.approx(0.3)


def test_cropping_a_batch_equals_cropping_its_samples_one_by_one(hand: ManoLayer) -> None:
    """Equal to the bit, also next to a dropped tilt, the identity and a hand without MANO parameters."""
    samples = [make_sample(hand, seed, bool(seed % 2)) for seed in range(12)]
    images = [np.random.default_rng(i).integers(0, 256, s.image.shape, np.uint8) for i, s in enumerate(samples)]
    samples = [
        dataclasses.replace(sample, image=image, has_mano=i != 7)
        for i, (sample, image) in enumerate(zip(samples, images))
    ]
    draws = [draw_augmentation(uniforms("batch", i, num=NUM_UNIFORM), KNOBS) for i in range(12)]
    draws[2], draws[5] = Augmentation(roll=0.3, tilt=(1.4, 0.0)), Augmentation()
    together = crop_samples(samples, draws, 48, 2.0)
    for i in range(12):
        for name, value in vars(crop(samples[i], draws[i], 48, 2.0)).items():
            assert name == "position" or np.array_equal(getattr(together, name)[i], value), (i, name)
