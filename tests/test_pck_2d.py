"""2D PCK relative to the hand's box, against values computed by hand and HaMeR's formula for HInt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from src.batch import Batch, Prediction, Sample
from src.data.augment import Augmentation
from src.data.crop import crop_samples
from src.evaluate.bootstrap import Estimate, Group
from src.evaluate.plot import plot_pck
from src.evaluate.tables import group_grids, metric_grid
from src.metric import PCK_2D, SampleMetric, box_target, compare, measure, to_source_image
from tests.helpers import random_batch

SIZE = 200.0  # longer side of the box of `target`, px


def target() -> np.ndarray:
    """[21, 2] px; the box of all joints is 100 wide and 200 high."""
    joint = np.random.default_rng(0).uniform([320, 110], [380, 290], (21, 2))
    joint[0], joint[1] = (300, 100), (400, 300)
    return joint


def moved(share: list[float]) -> np.ndarray:
    """`target` with joint i moved by share[i] of the box (the rest by 0.01), in different directions."""
    offset = np.full(21, 0.01 * SIZE)
    offset[: len(share)] = np.array(share) * SIZE
    angle = np.arange(21) * 2.0
    return target() + offset[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def measure_2d(pred: np.ndarray, target: np.ndarray, valid: np.ndarray) -> dict[str, SampleMetric]:
    return compare({"joint_2d": pred}, {"joint_2d": box_target(target, valid)})


def mean(metric: SampleMetric) -> float:
    return metric.total.sum() / metric.count.sum()


# joints 0-5 are off by these shares of the box, 6-20 by 0.01
SHARES = [0.04, 0.06, 0.11, 0.16, 0.21, 3.0]
RIGHT = {"pck05_2d": 16 / 21, "pck10_2d": 17 / 21, "pck15_2d": 18 / 21, "pck20_2d": 19 / 21}
# A joint is correct above its own share: 1 - share / 0.2 of the curve.
AREA = (15 * 0.95 + 0.8 + 0.7 + 0.45 + 0.2) / 21
HALF_A_STEP = 0.5 / 99  # error of the trapezoidal rule at a joint's step, relative to the whole area


def test_values_by_hand() -> None:
    got = measure_2d(moved(SHARES)[None], target()[None], np.ones((1, 21), bool))
    assert {name: mean(got[name]) for name in PCK_2D} == pytest.approx(RIGHT)
    assert mean(got["auc_2d"]) == pytest.approx(AREA, abs=HALF_A_STEP)
    assert got["curve_2d"].total.shape == (1, 100)
    assert got["curve_2d"].total[0, [0, 5, -1]].tolist() == [0, 15, 19]


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("img_size", [56, 224])
@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(roll=0.7, tilt=(0.2, -0.3), zoom=1.3)])
def test_independent_of_patch_size_augmentation_and_side(
    is_right: bool, img_size: int, augmentation: Augmentation
) -> None:
    """The prediction is mapped to the patch and back to pixels of the source image."""
    joint, one, box = target(), np.ones(21, np.float32), np.array([280.0, 80.0, 420.0, 320.0])
    sample = Sample(
        "k/0", "a", np.zeros((400, 640, 3), np.uint8), is_right, box, joint.astype(np.float32), one,
        np.zeros((21, 3)), np.zeros(21), np.zeros(48), np.zeros(10), False, True,
        np.array([500.0, 520.0]), np.array([319.5, 199.5]), True,
    )  # fmt: skip
    batch = crop_samples([sample], [augmentation], img_size, 2.0).map(torch.from_numpy)
    homography = batch.image_to_patch[0].double().numpy()
    patch = np.concatenate([moved(SHARES), np.ones((21, 1))], axis=1) @ homography.T
    prediction = prediction_of(batch, torch.tensor(patch[None, :, :2] / patch[None, :, 2:]))
    got = measure(prediction, batch, torch.zeros(1, 5, 3))
    assert {name: mean(got[name]) for name in PCK_2D} == pytest.approx(RIGHT)
    direct = measure_2d(moved(SHARES)[None], target()[None], np.ones((1, 21), bool))
    np.testing.assert_array_equal(got["curve_2d"].total, direct["curve_2d"].total)
    np.testing.assert_allclose(to_source_image(prediction.joint_patch, batch)[0], moved(SHARES), atol=2e-3)


def prediction_of(batch: Batch, joint_patch: torch.Tensor) -> Prediction:
    num = len(batch)
    return Prediction(
        mano_rotmat=torch.eye(3).expand(num, 16, 3, 3),
        mano_pose=batch.mano_pose,
        mano_shape=batch.mano_shape,
        root_cam=batch.joint_cam[:, 0],
        joint_cam=batch.joint_cam,
        vert_cam=torch.zeros(num, 5, 3),
        joint_patch=joint_patch,
        joint_seen=joint_patch,
    )


def test_invalid_joints_affect_neither_points_nor_box() -> None:
    valid = np.ones((1, 21), bool)
    valid[0, [5, 20]] = False
    place = target()
    place[20] = (-5000, np.nan)
    got = measure_2d(moved(SHARES)[None], place[None], valid)
    assert got["pck10_2d"].count.tolist() == [19]
    assert mean(got["pck10_2d"]) == pytest.approx(16 / 19)


def test_a_hand_without_a_box_does_not_count() -> None:
    """No valid joint, one, two at the same pixel; the other hand in the batch counts as before."""
    pred, place = np.tile(moved(SHARES), (4, 1, 1)), np.tile(target(), (4, 1, 1))
    valid = np.zeros((4, 21), bool)
    valid[1, 3] = valid[2, 3:5] = valid[3] = True
    place[2, 4] = place[2, 3]
    got = measure_2d(pred, place, valid)
    assert got["auc_2d"].count.tolist() == [0, 0, 0, 21]
    assert mean(got["pck05_2d"]) == pytest.approx(16 / 21)


def test_infinite_and_nan_predictions_are_wrong_at_every_threshold() -> None:
    for nothing in (np.inf, np.nan):
        got = measure_2d(np.full((1, 21, 2), nothing), target()[None], np.ones((1, 21), bool))
        assert [mean(got[name]) for name in (*PCK_2D, "auc_2d")] == [0.0] * 5
        assert got["auc_2d"].count.tolist() == [21]


def test_points_behind_the_source_camera_are_infinite() -> None:
    batch = random_batch(1, 56)
    batch.image_to_patch[0] = torch.linalg.inv(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.02, 0, 1]]))
    back = to_source_image(torch.tensor([[[10.0, 20.0], [-60.0, 20.0]]]), batch)
    np.testing.assert_allclose(back[0, 0], [10 / 1.2, 20 / 1.2], rtol=1e-5)
    assert np.isinf(back[0, 1]).all()


def test_pooled_hands_as_in_hamers_hint_evaluation() -> None:
    """hamer/utils/pose_utils.py, EvaluatorPCK: keypoint by keypoint, then their mean. With every joint valid this
    equals our share over all points; the box side replaces its `box_size / bbox_expand_factor`."""
    rng = np.random.default_rng(4)
    place = rng.uniform(0, 300, (9, 21, 2))
    pred = place + rng.normal(0, 25, place.shape)
    got = measure_2d(pred, place, np.ones((9, 21), bool))
    side = np.ptp(place, axis=1).max(axis=1)
    distance = np.sqrt(np.sum((pred - place) ** 2, axis=2))
    for name, threshold in PCK_2D.items():
        correct = distance <= side[:, None] * threshold
        assert mean(got[name]) == pytest.approx((correct.sum(axis=0) / len(correct)).mean())
        assert 0.1 < mean(got[name]) < 0.95


def test_tables_and_plot(tmp_path: Path) -> None:
    share = Estimate(1.0, 1.0, 1.0, 123456)
    metric = dict.fromkeys([*PCK_2D, "auc_2d"], share)
    groups = [Group("all", "all", 123456, metric, {}, {"joint_2d": [0.5] * 100})]
    groups.append(Group("source", "a data set with a long name", 7, metric, {}, {}))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(metric_grid(groups[0]).as_rich(), *(grid.as_rich() for grid in group_grids(groups)))
    lines = capture.get().splitlines()
    assert sum("100.0 [100.0, 100.0]" in line for line in lines) == 4 + 2, "one line each, not wrapped"
    assert any("2D PCK at 0.15 box, %" in line for line in lines)
    assert group_grids(groups[:1]) == []
    assert group_grids([Group("all", "all", 1, {}, {}, {})] * 2) == []
    plot_pck(groups[0], tmp_path / "pck.png")
    plot_pck(Group("all", "all", 1, {}, {}, {}), tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["pck.png"], "2D labels alone give a plot"
