"""The image-independent baseline: its predictions, that it is measured like a network, and its column in the table."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from src.batch import Batch
from src.data.demo.make import make_demo_shards
from src.data.loader import build_train_loader, build_val_loader
from src.data.mean_hand import MeanHand, mean_hand, mean_of, mean_rotation
from src.geometry.rotation import axis_angle_to_matrix
from src.hand.mano import ManoLayer
from src.hand.skeleton import HandArrays
from src.hand.standin.build import build_standin_hand
from src.metric import align_procrustes, compare, measure, target_points
from src.tracking.tracker import METRICS
from src.train.report import closing_table
from src.train.validation import VALIDATED, baseline_metrics
from tests.helpers import random_batch, small_config

SIDE = 56


@pytest.fixture(scope="module")
def hand() -> HandArrays:
    return build_standin_hand()


def labels_of(batch: Batch) -> Batch:
    return batch.map(torch.Tensor.numpy)


def vertices(hand: HandArrays, batch: Batch) -> torch.Tensor:
    layer = ManoLayer(hand)
    return layer(layer.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean), batch.mano_shape).vert


def test_mean_rotation_is_a_rotation() -> None:
    turn = axis_angle_to_matrix(torch.tensor([[0.0, 0.3, 0.0], [0.0, -0.1, 0.0]], dtype=torch.float64))
    expected = axis_angle_to_matrix(torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64))
    assert torch.allclose(mean_rotation(turn), expected, atol=1e-12)
    half_turns = axis_angle_to_matrix(
        torch.pi * torch.eye(3, dtype=torch.float64)
    )  # their mean is -1/3 of the identity
    assert torch.linalg.det(mean_rotation(half_turns)).item() == pytest.approx(1.0)


def test_predictions_are_the_means(hand: HandArrays) -> None:
    batch = random_batch(30, SIDE)
    mean = mean_of(labels_of(batch), hand, SIDE)
    joint = (batch.joint_cam - batch.joint_cam[:, :1]).double()
    assert np.allclose(mean.joint_rel, joint.mean(0), atol=1e-4)
    assert np.allclose(mean.vert_rel, vertices(hand, batch).double().mean(0), atol=1e-3)
    layer = ManoLayer(hand)
    rotmat = layer.pose_to_rotmat(batch.mano_pose, True)
    posed = layer(mean_rotation(rotmat.double())[None].float(), batch.mano_shape.mean(0, keepdim=True)).joint[0]
    assert np.allclose(mean.joint_posed, posed, atol=1e-3)
    middle = 0.5 * (SIDE - 1)
    assert np.allclose(mean.wrist_offset, (batch.joint_patch[:, 0].double() - middle).mean(0) / SIDE, atol=1e-6)
    assert mean.patch_width == pytest.approx(batch.joint_cam[:, 0, 2].mean().item() / 2, rel=1e-6), "focal is 2 S"


def test_hidden_labels_do_not_count(hand: HandArrays) -> None:
    """Labels whose flag is 0 may have any finite value."""
    batch = random_batch(8, SIDE)
    batch.joint_3d_valid[4:, 3], batch.joint_3d_valid[6:, 0] = 0, 0
    batch.has_mano[5:], batch.has_intr[3:] = 0, 0
    other = replace(batch, mano_pose=batch.mano_pose.clone(), joint_cam=batch.joint_cam.clone())
    other.mano_pose[5:], other.joint_cam[4:, 3], other.joint_cam[6:] = 1.0, 1e4, -1e4
    first, second = (mean_of(labels_of(each), hand, SIDE) for each in (batch, other))
    for f in fields(MeanHand):
        assert np.array_equal(getattr(first, f.name), getattr(second, f.name)), f.name


def test_the_wrist_follows_the_camera() -> None:
    """The wrist has the same position in the patch and the same patch width for any zoom and principal point."""
    mean = MeanHand(wrist_offset=np.array([0.1, -0.2]), patch_width=200.0)
    focal, princpt = np.array([[100.0, 100.0], [400.0, 400.0]]), np.array([[27.5, 27.5], [-60.0, 90.0]])
    root = mean.root_cam(focal, princpt, SIDE)
    assert np.allclose(root[:, 2], 200.0 * focal[:, 0] / SIDE)
    pixel = root[:, :2] / root[:, 2:] * focal + princpt
    assert np.allclose(pixel, 0.5 * (SIDE - 1) + SIDE * np.array([0.1, -0.2]))
    assert MeanHand().root_cam(focal, princpt, SIDE) is None


def test_measured_like_a_network(hand: HandArrays) -> None:
    """The same numbers as a network with these predictions, flag for flag."""
    batch = random_batch(9, SIDE, seed=1)
    mean = mean_of(labels_of(random_batch(30, SIDE)), hand, SIDE)
    batch.joint_3d_valid[2, 0], batch.joint_3d_valid[3, 5:], batch.has_mano[4], batch.has_intr[5] = 0, 0, 0, 0
    vert = vertices(hand, batch)
    root = torch.from_numpy(mean.root_cam(batch.patch_focal.double().numpy(), batch.patch_princpt.numpy(), SIDE))
    constant = SimpleNamespace(
        joint_cam=root[:, None] + torch.from_numpy(mean.joint_rel),
        vert_cam=root[:, None] + torch.from_numpy(mean.vert_rel - mean.joint_rel[0]),
        joint_patch=batch.joint_patch,
    )
    target = target_points(batch, vert)
    expected, found = measure(constant, batch, vert, VALIDATED), baseline_metrics(mean, batch, target)
    assert found.keys() == {f"{name}_mean_hand" for name in VALIDATED}
    posed = np.repeat(mean.joint_posed[None], len(batch), axis=0)
    posed = align_procrustes(posed, batch.joint_cam.double().numpy(), batch.joint_3d_valid.numpy())
    expected |= compare({"joint_pa": posed}, target, ["mpjpe_pa"])
    for name in VALIDATED:
        assert np.array_equal(found[f"{name}_mean_hand"].count, expected[name].count), name
        assert np.allclose(found[f"{name}_mean_hand"].total, expected[name].total, rtol=1e-9), name


@pytest.mark.parametrize(
    ("missing", "absent"),
    [
        (("has_mano",), {"mpjpe_pa", "mpvpe_rel"}),
        (("has_intr",), {"mpjpe_cam", "root_error"}),
        (("joint_3d_valid",), {"mpjpe_cam", "mpjpe_rel", "root_error"}),
        (("joint_3d_valid", "has_mano"), set(VALIDATED)),
    ],
)
def test_metrics_without_training_labels_are_absent(hand: HandArrays, missing: tuple, absent: set) -> None:
    train, val = random_batch(5, SIDE), random_batch(5, SIDE, seed=1)
    train = replace(train, **{name: torch.zeros_like(getattr(train, name)) for name in missing})
    found = baseline_metrics(mean_of(labels_of(train), hand, SIDE), val, target_points(val, vertices(hand, val)))
    assert found.keys() == {f"{name}_mean_hand" for name in {*VALIDATED} - absent}


def test_no_baseline_from_wrists_alone(hand: HandArrays) -> None:
    """A joint that is never known has no mean; it must not be taken for the wrist."""
    train, val = random_batch(5, SIDE), random_batch(5, SIDE, seed=1)
    train.joint_3d_valid[:, 1:] = 0
    mean = mean_of(labels_of(train), hand, SIDE)
    assert mean.joint_rel is None
    found = baseline_metrics(mean, val, target_points(val, vertices(hand, val)))
    assert found.keys() == {f"{name}_mean_hand" for name in ("mpjpe_pa", "mpvpe_rel", "root_error")}


def test_from_shards_as_from_crops(tmp_path: Path, hand: HandArrays) -> None:
    """Labels alone give the same as cropped samples of the same frames, including left hands; also with other threads
    and with a resumed run's dataset."""
    make_demo_shards(tmp_path, {"train": 24, "val": 2}, seed=0, img_size=64, num_process=1)
    places = (f"DATA.root={tmp_path}", "DATA.demo=null", "DATA.val.source=[train/*]", "augmentation=full")
    cfg = small_config(*places, "DATA.train.source=[train/*]")
    dataset = build_train_loader(cfg, "standin").dataset
    mean = mean_hand(dataset, hand)
    batches = [b.map(lambda t, b=b: t[b.position >= 0]) for b in build_val_loader(cfg, "standin")]
    tensors = [name for name, value in vars(batches[0]).items() if torch.is_tensor(value)]
    joined = SimpleNamespace(**{n: np.concatenate([getattr(b, n) for b in batches]) for n in tensors})
    assert len(joined.has_mano) == 24
    expected = mean_of(joined, hand, cfg.MODEL.img_size)
    for f in fields(MeanHand):
        assert np.allclose(getattr(mean, f.name), getattr(expected, f.name), atol=2e-4), f.name
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = mean_hand(build_train_loader(cfg, "standin", start=7, rank=1, world_size=2).dataset, hand)
    torch.set_num_threads(threads)
    for f in fields(MeanHand):
        assert np.array_equal(getattr(mean, f.name), getattr(again, f.name)), f.name


def test_closing_table_has_the_baseline_in_every_row(tmp_path: Path) -> None:
    first = {"step": 0, "subset": "val", **dict.fromkeys(VALIDATED, 200.0)}
    last = {"step": 9, "subset": "val", **dict.fromkeys(VALIDATED, 60.0), **{f"{n}_mean_hand": 80.0 for n in VALIDATED}}

    def table() -> list[str]:
        (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in (first, last)))
        console = Console(width=100)
        with console.capture() as capture:
            console.print(closing_table(tmp_path, 1.0))
        return [line for line in capture.get().splitlines() if "MP" in line or "root error" in line]

    assert len(table()) == 5
    for line in table():
        assert [cell.strip() for cell in line.split("│")[1:]] == ["200.0", "60.0", "80.0", "-25 %"], line
    del last["mpjpe_pa_mean_hand"]
    (without,) = [line for line in table() if "Procrustes" in line]
    assert [cell.strip() for cell in without.split("│")[1:]] == ["200.0", "60.0", "", ""]
    first["subset"] = "train"
    (only,) = [line for line in table() if "root error" in line]
    assert [cell.strip() for cell in only.split("│")[1:]] == ["60.0", "80.0", "-25 %"], "no column `before`"
    last["root_error_mean_hand"] = 1e-14
    (only,) = [line for line in table() if "root error" in line]
    assert [cell.strip() for cell in only.split("│")[1:]] == ["60.0", "0.0", ""], "no ratio to a baseline of 0"


def test_closing_table_without_labels_in_mm(tmp_path: Path) -> None:
    rows = [{"step": step, "subset": "val", "loss_total": 10.0 - step} for step in (0, 4)]
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(closing_table(tmp_path, 1.0))
    lines = capture.get().splitlines()
    assert any("loss" in line and "10.0 │   6.0" in line for line in lines), lines
    assert not any("mm" in line for line in lines)
