"""The hand camera: upright, centred on the hand, and independent of the patch camera's rotation."""

from __future__ import annotations

import math

import pytest
import torch

from src.geometry.camera import project
from src.geometry.rotation import axis_angle_to_matrix
from src.hand.standin.build import build_standin_hand
from src.model.hand_frame import HandFrame, hand_frame
from src.model.net import PoseNet
from tests.helpers import random_batch, small_config

IMG_SIZE = 56
FOCAL, PRINCPT = torch.tensor([[80.0, 80.0]]), torch.tensor([[10.0, 40.0]])


def random_hands(num: int) -> torch.Tensor:
    """Joints [num, 21, 3] mm, half a metre away and off-centre; the wrist is apart from the palm."""
    made = torch.Generator().manual_seed(0)
    joint = 30.0 * torch.randn(num, 21, 3, generator=made) + torch.tensor([60.0, -40.0, 500.0])
    joint[:, 0] += torch.tensor([90.0, 120.0, 0.0])
    return joint


def frame_of(joint: torch.Tensor) -> tuple[HandFrame, torch.Tensor]:
    """The frame of joints [B, 21, 3] mm in the camera above, and their projection in it."""
    focal, princpt = FOCAL.expand(len(joint), 2), PRINCPT.expand(len(joint), 2)
    seen = project(joint, focal, princpt)
    frame = hand_frame(seen, focal, princpt, IMG_SIZE)
    return frame, frame.project(seen, focal, princpt)


def test_the_rotation_centres_the_hand_upright() -> None:
    frame, view = frame_of(random_hands(64))
    assert torch.allclose(frame.rot @ frame.rot.mT, torch.eye(3).expand(64, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(frame.rot), torch.ones(64), atol=1e-5)
    upwards = view[:, [5, 9, 13, 17]].mean(1) - view[:, 0]
    assert upwards[:, 0].abs().max() < 1e-4
    assert (upwards[:, 1] < -0.1).all()
    assert view.mean(1).abs().max() < 0.1 * view.abs().max()


@pytest.mark.parametrize("axis_angle", [(0.0, 0.0, 2.5), (0.2, -0.15, 0.0), (-0.1, 0.2, -1.0)])
def test_a_rotated_patch_camera_gives_the_same_view(axis_angle: tuple[float, float, float]) -> None:
    """The hand camera and its view do not depend on the rotation of the patch camera."""
    joint = random_hands(16)
    turn = axis_angle_to_matrix(torch.tensor(axis_angle))
    frame, view = frame_of(joint)
    turned_frame, turned_view = frame_of(joint @ turn.T)
    assert torch.allclose(turned_view, view, atol=1e-4)
    assert torch.allclose(turned_frame.rot, turn @ frame.rot, atol=1e-4)


def test_a_palm_of_zero_length_causes_no_roll() -> None:
    """Keypoints in one place, as before training, or a hand that points at the camera: its roll would be noise."""
    noise = 0.1 * torch.randn(2, 21, 2, generator=torch.Generator().manual_seed(0))
    for seen in (torch.full((2, 21, 2), 20.0), 20.0 + noise):
        rot = hand_frame(seen, FOCAL.expand(2, 2), PRINCPT.expand(2, 2), IMG_SIZE).rot
        assert torch.allclose(rot @ rot.mT, torch.eye(3).expand(2, 3, 3), atol=1e-5)
        assert rot[:, 0, 0].min() > 0.95


def test_the_frame_is_detached_and_the_view_has_finite_gradients() -> None:
    seen = project(random_hands(4), FOCAL, PRINCPT).requires_grad_()
    frame = hand_frame(seen, FOCAL.expand(4, 2), PRINCPT.expand(4, 2), IMG_SIZE)
    assert not frame.rot.requires_grad
    frame.project(seen, FOCAL.expand(4, 2), PRINCPT.expand(4, 2)).square().sum().backward()
    assert seen.grad is not None
    assert seen.grad.isfinite().all()
    assert seen.grad.abs().sum() > 0


def test_the_root_rotation_is_relative_to_the_frame() -> None:
    """The same queries in a rotated frame give the same hand, rotated."""
    torch.manual_seed(0)
    net, batch = PoseNet(small_config().MODEL, build_standin_hand()).eval(), random_batch(3, IMG_SIZE)
    heat = torch.zeros(3, net.backbone.grid_size**2, 21)
    args = (torch.randn(3, 18, net.decoder.query.shape[1]), torch.rand(3, 21, 2) * IMG_SIZE, heat)
    turn = axis_angle_to_matrix(torch.tensor([0.3, -0.2, math.pi / 2]))
    straight, turned = (
        net._predict(*args, HandFrame(rot.expand(3, 3, 3), torch.ones(3, 1)), batch.patch_focal, batch.patch_princpt)
        for rot in (torch.eye(3), turn)
    )
    rel = [out.joint_cam - out.root_cam[:, None] for out in (straight, turned)]
    assert torch.allclose(rel[1], rel[0] @ turn.T, atol=1e-3)
    assert torch.equal(straight.root_cam, turned.root_cam)
    assert torch.equal(straight.mano_rotmat[:, 1:], turned.mano_rotmat[:, 1:])
