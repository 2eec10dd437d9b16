"""Loss terms: masks, values, means over counts, and gradients of the pose."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from src.batch import Batch, Prediction
from src.geometry.camera import project
from src.hand.mano import ManoLayer
from src.hand.standin.build import build_standin_hand
from src.loss import HEAT_SIGMA, LOSS_TERMS, NUM_TERM, loss_counts, loss_sums, mean_terms
from tests.helpers import random_batch

HAND = ManoLayer(build_standin_hand())
THETA, SHAPE, TRANS, REL, IMG, SEEN, HEAT = range(NUM_TERM)
GRID = 8


def predict(batch: Batch, pose: torch.Tensor, shape: torch.Tensor, root: torch.Tensor) -> Prediction:
    rotmat = HAND.pose_to_rotmat(pose, True)
    vert, joint = HAND(rotmat, shape)
    joint_cam = joint + root[:, None]
    joint_patch = project(joint_cam, batch.patch_focal, batch.patch_princpt)
    heat = gaussian_heat(joint_patch, batch.patch.shape[-1])
    return Prediction(rotmat, pose, shape, root, joint_cam, vert + root[:, None], joint_patch, joint_patch, heat)


def gaussian_heat(joint: torch.Tensor, size: int) -> torch.Tensor:
    """[B, G, G, 21] log of a Gaussian over all tokens around each joint [B, 21, 2] px, without separating the axes."""
    centre = (torch.arange(GRID) + 0.5) * size / GRID - 0.5
    token = torch.stack(torch.meshgrid(centre, centre, indexing="xy"), dim=-1)  # x, y of [row, column]
    square = (token[None, :, :, None] - joint[:, None, None]).square().sum(-1) / (size / GRID) ** 2
    return (-0.5 * square / HEAT_SIGMA**2).flatten(1, 2).log_softmax(dim=1).unflatten(1, (GRID, GRID))


def consistent_batch(num: int = 4) -> tuple[Batch, Prediction]:
    """A batch whose labels all come from the hand model, and the prediction that matches all of them."""
    batch = random_batch(num, 56)
    truth = predict(batch, batch.mano_pose, batch.mano_shape, torch.tensor([[10.0, -20.0, 500.0]]).repeat(num, 1))
    return replace(batch, joint_cam=truth.joint_cam, joint_patch=truth.joint_patch), truth


def mean_losses(prediction: Prediction, batch: Batch) -> torch.Tensor:
    return mean_terms(loss_sums(prediction, batch, HAND).sum(0), loss_counts(batch).sum(0))


def test_a_perfect_prediction_has_zero_loss() -> None:
    batch, truth = consistent_batch()
    assert torch.allclose(mean_losses(truth, batch), torch.zeros(NUM_TERM), atol=1e-3)
    in_patch = ((batch.joint_patch > -0.5) & (batch.joint_patch < 55.5)).all(-1).sum(1).tolist()
    assert loss_counts(batch).tolist() == [[1, 1, 1, 21, 21, 21, num] for num in in_patch]


def test_values_by_hand() -> None:
    batch, truth = consistent_batch()
    moved = predict(batch, batch.mano_pose, batch.mano_shape + 0.5, truth.root_cam + torch.tensor([3.0, 0.0, 6.0]))
    loss = mean_losses(moved, batch)
    assert loss[THETA] == pytest.approx(0.0, abs=1e-6)
    assert loss[SHAPE] == pytest.approx(0.5, rel=1e-5)
    assert loss[TRANS] == pytest.approx(3.0, rel=1e-5), "mean over the axes of 3, 0 and 6 mm"
    assert loss[REL] > 0.1
    assert loss[IMG] > 0.1


def test_flat_hand_mean_is_respected() -> None:
    """The same hand, with and without the model's mean pose in its angles, gives the same target."""
    batch, truth = consistent_batch()
    mean = torch.cat((torch.zeros(3), HAND.mean_pose))
    other = replace(batch, mano_pose=batch.mano_pose - mean, flat_hand_mean=torch.zeros(4, dtype=torch.bool))
    assert loss_sums(truth, other, HAND)[:, THETA] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("field", "terms"),
    [
        ("has_mano", {THETA, SHAPE}),
        ("has_intr", {TRANS}),
        ("joint_2d_valid", {IMG, SEEN, HEAT}),
        ("joint_3d_valid", {TRANS, REL}),
    ],
)
def test_each_label_has_its_own_mask(field: str, terms: set[int]) -> None:
    """Samples without a label affect neither other terms nor the mean of its own terms."""
    batch, truth = consistent_batch()
    guess = predict(batch, 0.5 * batch.mano_pose, batch.mano_shape + 1, truth.root_cam + 20)
    everything = loss_sums(guess, batch, HAND)
    flag = getattr(batch, field).clone()
    flag[2:] = 0.0
    masked = replace(batch, **{field: flag})
    sums, counts = loss_sums(guess, masked, HAND), loss_counts(masked)
    for term in range(NUM_TERM):
        is_masked = term in terms
        assert (sums[2:, term] == 0).all() == is_masked, LOSS_TERMS[term]
        assert (counts[2:, term] == 0).all() == is_masked, LOSS_TERMS[term]
        assert torch.equal(sums[:2, term], everything[:2, term])
        expected = everything[:2] if is_masked else everything
        expected_count = loss_counts(batch)[: len(expected)]
        mean = mean_terms(sums.sum(0), counts.sum(0))[term]
        assert torch.isclose(mean, (expected.sum(0) / expected_count.sum(0))[term])


def test_a_lone_root_does_not_count_as_a_root_relative_joint() -> None:
    """Its error relative to itself is 0: it would dilute the mean of the hands with other joints."""
    batch, truth = consistent_batch()
    guess = predict(batch, 0.5 * batch.mano_pose, batch.mano_shape, truth.root_cam + 20)
    valid = batch.joint_3d_valid.clone()
    valid[2:, 1:] = 0.0
    masked = replace(batch, joint_3d_valid=valid)
    sums, counts = loss_sums(guess, masked, HAND), loss_counts(masked)
    assert counts[:, REL].tolist() == [21.0, 21.0, 0.0, 0.0]
    assert counts[:, TRANS].tolist() == [1.0] * 4, "the root's position is a target of its own"
    assert torch.equal(sums[:2, REL], loss_sums(guess, batch, HAND)[:2, REL])


def test_without_valid_items_the_loss_is_zero() -> None:
    batch, truth = consistent_batch()
    nothing = {
        f: torch.zeros_like(getattr(batch, f)) for f in ("has_mano", "has_intr", "joint_2d_valid", "joint_3d_valid")
    }
    assert mean_losses(truth, replace(batch, **nothing)).tolist() == [0.0] * NUM_TERM
    assert loss_counts(replace(batch, position=torch.full((4,), -1))).sum() == 0, "padding does not count"


def test_heat_by_hand() -> None:
    """Uniform weights over N tokens give log N - H(target); joints outside the patch do not count."""
    batch, truth = consistent_batch()
    middle = torch.full_like(batch.joint_patch, 24.0)
    middle[:, 3] = torch.tensor([-1.0, 24.0])
    batch = replace(batch, joint_patch=middle)
    uniform = torch.full_like(truth.joint_heat, -math.log(GRID * GRID))
    log_target = gaussian_heat(middle, 56)[:, :, :, :1]
    entropy = -(log_target.exp() * log_target).sum((1, 2)).mean()
    loss = mean_losses(replace(truth, joint_heat=uniform), batch)[HEAT]
    assert loss == pytest.approx(math.log(GRID * GRID) - entropy.item(), rel=1e-4)
    assert loss_counts(batch)[:, HEAT].tolist() == [20.0] * 4


@pytest.mark.parametrize("term", [THETA, REL, IMG])
def test_gradient_reaches_the_pose(term: int) -> None:
    batch, truth = consistent_batch()
    pose = (0.5 * batch.mano_pose).requires_grad_()
    guess = predict(batch, pose, batch.mano_shape, truth.root_cam)
    loss_sums(guess, batch, HAND).sum(0)[term].backward()
    assert torch.isfinite(pose.grad).all()
    moving = pose.grad.view(4, 16, 3).abs().sum((0, 2)) > 0
    assert moving.all(), f"{LOSS_TERMS[term]} has no gradient for some joint of the pose"


def test_split_batches_add_up() -> None:
    batch, truth = consistent_batch()
    guess = predict(batch, 0.5 * batch.mano_pose, batch.mano_shape, truth.root_cam)
    assert loss_sums(guess, batch, HAND).shape == (4, NUM_TERM)
    assert torch.allclose(
        loss_sums(guess, batch, HAND)[:2].sum(0) + loss_sums(guess, batch, HAND)[2:].sum(0),
        loss_sums(guess, batch, HAND).sum(0),
    )
