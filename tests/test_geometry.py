"""Rotations against scipy, their gradients at singularities, and the camera in numpy and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from src.geometry.camera import MIN_DEPTH_MM, pixel_ray, project, unproject
from src.geometry.rotation import (
    axis_angle_to_matrix,
    matrix_to_axis_angle,
    matrix_to_rotation_6d,
    rotation_6d_to_matrix,
)

UNIT = np.random.default_rng(0).normal(size=(40, 3))
UNIT /= np.linalg.norm(UNIT, axis=1, keepdims=True)
ANGLES = [0.0, 1e-20, 1e-8, 1e-4, 3.1e-3, 3.2e-3, 0.1, 1.0, 2.0, 3.0, np.pi - 1e-4, np.pi - 1e-8, np.pi]


@pytest.mark.parametrize("angle", [*ANGLES, 4.0, 9.0])
def test_axis_angle_to_matrix_agrees_with_scipy(angle):
    expected = Rotation.from_rotvec(UNIT * angle).as_matrix()
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        got = axis_angle_to_matrix(torch.tensor(UNIT * angle, dtype=dtype))
        assert got.dtype == dtype
        np.testing.assert_allclose(got.numpy(), expected, atol=tol)


@pytest.mark.parametrize("angle", ANGLES)
def test_matrix_to_axis_angle_is_the_inverse(angle):
    matrix = torch.tensor(Rotation.from_rotvec(UNIT * angle).as_matrix())
    vec = matrix_to_axis_angle(matrix)
    np.testing.assert_allclose(axis_angle_to_matrix(vec).numpy(), matrix.numpy(), atol=1e-12)
    np.testing.assert_allclose(vec.norm(dim=-1).numpy(), angle, atol=1e-7)
    if angle < np.pi - 1e-7:  # at pi the axis has two signs
        np.testing.assert_allclose(vec.numpy(), UNIT * angle, atol=1e-7)
    single = matrix_to_axis_angle(matrix.float())
    np.testing.assert_allclose(axis_angle_to_matrix(single).numpy(), matrix.numpy(), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_identity_and_pi(dtype):
    special = np.concatenate([UNIT * a for a in ANGLES] + [np.eye(3) * np.pi, -np.eye(3) * np.pi, np.zeros((1, 3))])
    vec = torch.tensor(special, dtype=dtype, requires_grad=True)
    matrix = axis_angle_to_matrix(vec)
    back = matrix_to_axis_angle(matrix)
    (grad,) = torch.autograd.grad((back * torch.arange(3)).sum(), vec, retain_graph=True)
    assert torch.isfinite(grad).all()
    exact = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=dtype)).requires_grad_()  # pi about z, no rounding
    out = matrix_to_axis_angle(exact)
    assert torch.isfinite(torch.autograd.grad(out.sum(), exact)[0]).all()


def test_gradients_are_correct_near_zero():
    for scale in (0.0, 1e-9, 2e-3, 3.2e-3, 0.5):
        vec = torch.tensor(UNIT[:4] * scale, requires_grad=True)
        assert torch.autograd.gradcheck(axis_angle_to_matrix, (vec,), eps=1e-7, atol=1e-6)
        assert torch.autograd.gradcheck(
            lambda v: matrix_to_axis_angle(axis_angle_to_matrix(v)), (vec,), eps=1e-7, atol=1e-6
        )


def test_rotation_6d_round_trip():
    matrix = torch.tensor(Rotation.from_rotvec(UNIT * 2.0).as_matrix())
    six = matrix_to_rotation_6d(matrix)
    np.testing.assert_allclose(six[:, :3].numpy(), matrix[:, :, 0].numpy())  # the first column comes first
    np.testing.assert_allclose(rotation_6d_to_matrix(six).numpy(), matrix.numpy(), atol=1e-12)
    # Gram-Schmidt removes any scale and any component of the second part along the first
    leaning = torch.cat((3 * six[:, :3], 0.2 * six[:, 3:] + 0.7 * six[:, :3]), dim=-1)
    np.testing.assert_allclose(rotation_6d_to_matrix(leaning).numpy(), matrix.numpy(), atol=1e-12)
    random = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(rotation_6d_to_matrix, (random,))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=6))
def test_any_6d_vector_gives_a_rotation(numbers):
    six = torch.tensor([numbers], dtype=torch.float32, requires_grad=True)
    matrix = rotation_6d_to_matrix(six)
    np.testing.assert_allclose((matrix.mT @ matrix).detach()[0].numpy(), np.eye(3), atol=2e-6)
    assert torch.linalg.det(matrix.detach()).item() == pytest.approx(1.0, abs=1e-5)
    assert torch.isfinite(torch.autograd.grad((matrix * torch.arange(9.0).view(3, 3)).sum(), six)[0]).all()


@pytest.mark.parametrize("numbers", [[0] * 6, [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0], [1, 2, 3, 2, 4, 6], [1e-30] * 6])
def test_degenerate_6d_vectors_give_a_rotation(numbers):
    six = torch.tensor([numbers], dtype=torch.float32, requires_grad=True)
    matrix = rotation_6d_to_matrix(six)
    np.testing.assert_allclose((matrix.mT @ matrix).detach()[0].numpy(), np.eye(3), atol=2e-6)
    assert torch.isfinite(torch.autograd.grad(matrix.sum(), six)[0]).all()


def test_rotations_stay_float32_under_autocast():
    vec = torch.tensor(UNIT, dtype=torch.float32)
    plain = axis_angle_to_matrix(vec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matrix = axis_angle_to_matrix(vec)
        assert torch.equal(matrix, plain)
        assert rotation_6d_to_matrix(matrix_to_rotation_6d(matrix).bfloat16()).dtype == torch.float32
        assert torch.equal(matrix_to_axis_angle(matrix), matrix_to_axis_angle(plain))


FOCAL, PRINCPT = np.array([[500.0, 480.0], [900.0, 900.0]]), np.array([[112.0, 100.0], [320.0, 240.0]])
POINT = np.random.default_rng(1).normal(0, 100, (2, 21, 3)) + np.array([0.0, 0.0, 600.0])


def test_project_by_the_intrinsic_matrix():
    pixel = project(POINT, FOCAL, PRINCPT)
    for b in range(2):
        matrix = np.array([[FOCAL[b, 0], 0, PRINCPT[b, 0]], [0, FOCAL[b, 1], PRINCPT[b, 1]], [0, 0, 1]])
        homogeneous = POINT[b] @ matrix.T
        np.testing.assert_allclose(pixel[b], homogeneous[:, :2] / homogeneous[:, 2:], rtol=1e-12)
    np.testing.assert_allclose(unproject(pixel, POINT[..., 2], FOCAL, PRINCPT), POINT, rtol=1e-9)
    np.testing.assert_allclose(pixel_ray(pixel, FOCAL, PRINCPT), POINT[..., :2] / POINT[..., 2:], atol=1e-12)


def test_camera_agrees_for_arrays_and_tensors():
    point, focal, princpt = (torch.tensor(a) for a in (POINT, FOCAL, PRINCPT))
    pixel = project(point, focal, princpt)
    np.testing.assert_array_equal(pixel.numpy(), project(POINT, FOCAL, PRINCPT))
    np.testing.assert_allclose(unproject(pixel, point[..., 2], focal, princpt).numpy(), POINT, rtol=1e-9)


def test_points_behind_the_camera_project_to_finite_pixels():
    point = torch.tensor([[[10.0, -5.0, 0.0], [10.0, -5.0, -300.0], [10.0, -5.0, MIN_DEPTH_MM]]], requires_grad=True)
    pixel = project(point, torch.full((1, 2), 500.0), torch.full((1, 2), 112.0))
    assert torch.equal(pixel[0, 0], pixel[0, 2])
    assert torch.equal(pixel[0, 1], pixel[0, 2])
    (grad,) = torch.autograd.grad(pixel.sum(), point)
    assert torch.isfinite(grad).all()
    assert (grad[0, :2, 2] == 0).all()
