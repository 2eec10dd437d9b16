"""How pixels reach the patch: the same framing for any shape of pixel, one antialiased shrink without phase or edge."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from src.batch import Sample
from src.data.augment import Augmentation
from src.data.crop import crop_samples
from src.geometry.patch import BORDER, Aim, PatchView, apply_warp, plan_warps, view_of_patch, warp_image
from src.predict.predictor import Predictor

SIZE, SIDE = 700, 64  # of the source and of the patch, px
SCALES = [0.11, 0.15, 0.3, 0.49, 0.51, 0.6, 0.75, 0.9, 1.0, 1.3]
SWUNG = [(0.0, (0.0, 0.0)), (0.6, (0.0, 0.0)), (-2.0, (0.1, 0.05))]  # roll, tilt


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def drawing() -> np.ndarray:
    """Text and filled shapes: the hard edges on which aliasing shows most."""
    image, rng = np.full((SIZE, SIZE, 3), 255, np.uint8), np.random.default_rng(1)
    for row in range(12, SIZE, 24):
        cv2.putText(image, "the quick brown fox jumps 0123456789 " * 3, (3, row), 0, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    for x, y, r in rng.integers(20, SIZE - 20, (12, 3)):
        cv2.circle(image, (int(x), int(y)), int(r % 40) + 5, rng.integers(0, 256, 3).tolist(), -1)
    return image


def aim_at(center: np.ndarray, scale: float, size: tuple[int, int], roll: float, tilt: tuple[float, float]) -> Aim:
    """A right hand whose patch shows the source at `scale`."""
    half = 0.25 * SIDE / scale
    box = np.array([*(center - half * np.array([1.0, 0.8])), *(center + half * np.array([1.0, 0.8]))])
    princpt = 0.5 * (np.array(size) - 1.0)
    return Aim(box, np.array([900.0, 900.0]), princpt, True, 2.0, roll, tilt)


def moved(aim: Aim, by: int) -> Aim:
    return dataclasses.replace(aim, box=aim.box - by, princpt=aim.princpt - by)


def render(image: np.ndarray, aim: Aim) -> np.ndarray:
    return warp_image(image, view_of_patch(aim, SIDE), SIDE).astype(int)


def area_average(image: np.ndarray, view: PatchView) -> np.ndarray:
    """The ideal: every patch pixel is the mean of 16 x 16 bilinear samples of its square, in float32."""
    fine = 16
    to_fine = np.array([[fine, 0.0, 0.5 * (fine - 1)], [0.0, fine, 0.5 * (fine - 1)], [0.0, 0.0, 1.0]])
    matrix = (view.patch_to_image @ np.linalg.inv(to_fine))[:2]
    how = {"flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, "borderMode": cv2.BORDER_REFLECT}
    samples = cv2.warpAffine(image.astype(np.float32), matrix, (SIDE * fine, SIDE * fine), **how)
    return samples.reshape(SIDE, fine, SIDE, fine, 3).mean(axis=(1, 3))


def quality(image: np.ndarray, view: PatchView, patch: np.ndarray) -> float:
    """PSNR of a patch against the ideal, dB, away from its border."""
    inside = np.abs(np.mgrid[:SIDE, :SIDE] - 0.5 * SIDE).max(axis=0) < 0.3 * SIDE
    return float(10.0 * np.log10(255.0**2 / np.mean((area_average(image, view) - patch)[inside] ** 2)))


@pytest.mark.parametrize("stretch", [(0.5, 1.0), (0.75, 1.0), (1.33, 1.0), (2.0, 1.0), (1.0, 1.7), (0.6, 1.4)])
@pytest.mark.parametrize("is_right", [True, False])
def test_a_stretched_image_gives_the_same_patch_camera(stretch: tuple[float, float], is_right: bool) -> None:
    """Also under roll, tilt, zoom and shift: pixels that are not square change nothing."""
    box, focal, princpt = np.array([985.0, 671, 1157, 996]), np.array([1376.0, 1376]), np.array([967.0, 526])
    factor = np.array(stretch)
    for more in ({}, {"roll": 0.7, "tilt": (0.1, -0.15), "zoom": 1.1, "shift": (0.1, -0.05)}):
        square = view_of_patch(Aim(box, focal, princpt, is_right, 1.4, **more), 224)
        aim = Aim(box * np.tile(factor, 2), focal * factor, princpt * factor, is_right, 1.4, **more)
        stretched = view_of_patch(aim, 224)
        np.testing.assert_allclose(stretched.focal, square.focal, rtol=1e-12)
        np.testing.assert_allclose(stretched.princpt, square.princpt, rtol=1e-12, atol=1e-9)
        composed = stretched.image_to_patch @ np.diag([*factor, 1.0])
        np.testing.assert_allclose(composed, square.image_to_patch, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(stretched.scale * factor, square.scale, rtol=1e-9)
    # FreiHAND's kind of box: 172 x 325 px of 1.4 x 325
    view = view_of_patch(Aim(box, focal, princpt, is_right, 1.4), 224)
    corner = np.array([[box[0], box[1], 1.0], [box[2], box[3], 1.0]]) @ view.image_to_patch.T
    np.testing.assert_allclose(np.abs(np.diff(corner[:, :2], axis=0))[0], [84.7, 160.0], atol=0.05)


def test_a_stretched_image_gives_the_same_pixels() -> None:
    """Twice as wide by repeating pixels: filtered twice as far along x, so that the patch is the same."""
    image = cv2.GaussianBlur(noise(), (0, 0), 1.5)
    aim = aim_at(np.array([350.0, 340.0]), 0.3, (SIZE, SIZE), 0.4, (0.0, 0.0))
    wide = dataclasses.replace(
        aim,
        box=(aim.box + 0.5) * (2, 1, 2, 1) - 0.5,
        focal=aim.focal * (2, 1),
        princpt=(aim.princpt + 0.5) * (2, 1) - 0.5,
    )
    assert np.abs(render(np.repeat(image, 2, axis=1), wide) - render(image, aim)).max() <= 3
    (warp,) = plan_warps([(2 * SIZE, SIZE)], view_of_patch(wide, SIDE)[None], SIDE)
    assert [taps.size for taps in warp.filters] == [13, 7]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("make", [noise, drawing])
def test_a_shrink_has_no_phase_and_no_side(scale: float, make) -> None:
    """Where the stored image begins and which hand it shows changes nothing."""
    image = make()
    center = np.array([341.3, 352.6])
    for roll, tilt in SWUNG:
        aim = aim_at(center, scale, (SIZE, SIZE), roll, tilt)
        patch = render(image, aim)
        outline = np.array([[-0.5, -0.5, 1], [SIDE - 0.5, -0.5, 1], [SIDE - 0.5] * 2 + [1], [-0.5, SIDE - 0.5, 1]])
        outline = outline @ view_of_patch(aim, SIDE).patch_to_image.T
        first = int(max(0, (outline[:, :2] / outline[:, 2:]).min() - 3.0 / scale))
        for cut in {0, first, first - 1, first - 2, first // 2 | 1} if first > 3 else ():
            other = render(image[cut:, cut:], moved(aim, cut))
            assert np.abs(other - patch).max() <= 2, (roll, cut)
        width = SIZE - 1.0
        mirror = dataclasses.replace(aim, box=np.array([width, 0, width, 0]) - aim.box[[2, 1, 0, 3]] * (1, -1, 1, -1))
        mirror = dataclasses.replace(mirror, is_right=False)
        assert np.abs(render(np.ascontiguousarray(image[:, ::-1]), mirror) - patch).max() <= 2, roll


@pytest.mark.parametrize(
    ("scale", "of_noise", "of_drawing"),  # dB, one below the measured values; at 0.51 without a filter 18.5 and 24.3
    [(0.11, 35, 29), (0.2, 32, 31), (0.3, 31, 33), (0.49, 31, 40), (0.51, 28, 38), (0.6, 23, 32), (0.75, 21, 34)],
)
def test_a_shrink_is_close_to_the_area_average(scale: float, of_noise: float, of_drawing: float) -> None:
    view = view_of_patch(aim_at(np.array([350.2, 349.1]), scale, (SIZE, SIZE), 0.5, (0.0, 0.0)), SIDE)
    assert quality(noise(), view, warp_image(noise(), view, SIDE)) > of_noise
    assert quality(drawing(), view, warp_image(drawing(), view, SIDE)) > of_drawing


@pytest.mark.parametrize("scale", [0.4, 0.49, 0.51, 0.6, 0.75])
def test_a_shrink_is_as_close_as_with_the_gaussian_of_hamer_s_crops(scale: float) -> None:
    view = view_of_patch(aim_at(np.array([350.2, 349.1]), scale, (SIZE, SIZE), 0.5, (0.0, 0.0)), SIDE)
    (warp,) = plan_warps([(SIZE, SIZE)], view[None], SIDE)
    image = noise() // 2 + 64
    blurred = cv2.GaussianBlur(image, (0, 0), 0.5 * (1.0 / scale - 1.0))
    theirs = apply_warp(blurred, dataclasses.replace(warp, filters=None), SIDE)
    ours = quality(image, view, apply_warp(image, warp, SIDE))
    assert ours >= quality(image, view, theirs)
    assert scale != 0.51 or ours > 35


@pytest.mark.parametrize("scale", SCALES)
def test_a_patch_shows_the_image_up_to_its_edge(scale: float) -> None:
    """Nothing inside the image is mixed with the border's grey beyond a source pixel, on any side."""
    for size in ((200, 151), (97, 128), (7, 300)):
        white = np.full((size[1], size[0], 3), 255, np.uint8)
        for x, y in ((0.0, 0.0), (size[0] - 1.0, size[1] - 1.0), (size[0] - 1.0, 0.0)):
            view = view_of_patch(aim_at(np.array([x, y]), scale, size, 0.3, (0.0, 0.0)), SIDE)
            patch = warp_image(white, view, SIDE)
            source = np.mgrid[:SIDE, :SIDE][::-1].reshape(2, -1).T @ view.patch_to_image[:2, :2].T
            source = (source + view.patch_to_image[:2, 2]).reshape(SIDE, SIDE, 2)
            beyond = np.maximum(-source, source - (np.array(size) - 1.0)).max(axis=-1)
            assert (patch[beyond <= 0] == 255).all()
            assert (patch[beyond >= 1.01] == BORDER).all()


def test_no_pixel_is_filtered_from_the_source_s_scale_on() -> None:
    for scale in (0.72, 1.0, 2.0):
        view = view_of_patch(aim_at(np.array([350.0, 340.0]), scale, (SIZE, SIZE), 0.4, (0.0, 0.0)), SIDE)
        assert plan_warps([(SIZE, SIZE)], view[None], SIDE)[0].filters is None
    flat = np.full((SIZE, SIZE, 3), (255, 3, 129), np.uint8)
    for scale in (0.02, 0.11, 0.3, 0.51, 0.7):
        patch = warp_image(flat, view_of_patch(aim_at(np.array([350.0, 340.0]), scale, (SIZE, SIZE), 0, (0, 0)), 9), 9)
        assert (patch[4, 4] == flat[0, 0]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 2)])
def test_tiny_images_are_shrunk(size: tuple[int, int]) -> None:
    image = np.full((size[1], size[0], 3), 200, np.uint8)
    for scale in (0.05, 0.2, 0.5):
        view = view_of_patch(aim_at(0.5 * (np.array(size) - 1.0), scale, size, 0.2, (0.0, 0.0)), SIDE)
        assert warp_image(image, view, SIDE).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("is_right", [True, False])
def test_prediction_cuts_the_patches_of_training(is_right: bool) -> None:
    """Equal to the bit, shrunk by several factors and with pixels that are not square."""
    images = [noise(), drawing()[:500]]
    boxes = [[[120.0, 130.0, 480.5, 410.0], [300.0, 310.0, 352.0, 371.0]], [[10.0, 4.0, 690.0, 480.0]]]
    focal, princpt = np.array([[700.0, 560.0], [500.0, 800.0]]), np.array([[350.0, 340.0], [333.0, 260.0]])
    seen = {}

    class Captured(Exception):
        pass

    def predict_patch(*inputs: object) -> None:
        seen["patch"] = inputs[0].numpy()
        raise Captured

    device = SimpleNamespace(device="cpu")
    network = SimpleNamespace(
        hand=SimpleNamespace(num_vertex=3), img_size=SIDE, centre=device, predict_patch=predict_patch
    )
    with pytest.raises(Captured):
        Predictor(SimpleNamespace(network=network, crop=2.0)).predict(images, boxes, focal, princpt, is_right)
    zero = {name: np.zeros(shape, np.float32) for name, shape in (("joint_img", (21, 2)), ("joint_cam", (21, 3)))}
    zero |= {"mano_pose": np.zeros(48), "mano_shape": np.zeros(10)}
    samples = [
        Sample(
            key="k",
            source="s",
            image=images[i],
            is_right=is_right,
            has_mano=False,
            flat_hand_mean=True,
            has_intr=True,
            hand_bbox=np.array(box, np.float32),
            focal=focal[i].astype(np.float32),
            princpt=princpt[i].astype(np.float32),
            joint_2d_valid=np.zeros(21, np.float32),
            joint_3d_valid=np.zeros(21, np.float32),
            **zero,
        )
        for i in range(2)
        for box in boxes[i]
    ]
    batch = crop_samples(samples, [Augmentation()] * 3, SIDE, 2.0)
    np.testing.assert_array_equal(seen["patch"], batch.patch)
