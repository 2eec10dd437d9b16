"""Predict hands in images, in three lines of Python:

    from src.predict.predictor import Predictor
    predictor = Predictor.load("model/hand-mini")
    hands = predictor.predict([image], [[412, 230, 655, 480]], is_right=True)

Patches are cut as in training; predictions are rotated and mirrored back to the camera of each image.
Shape legend: M images, N hands, V vertices, F faces, S patch side, J = 21 joints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from src.batch import NUM_JOINT, NUM_POSE, NUM_SHAPE, Prediction
from src.checkpoint.network import LoadedNetwork, load_network
from src.geometry.camera import guess_intrinsics, project
from src.geometry.patch import MIRROR, Aim, PatchView, mirror_pose, view_of_patch, warp_image
from src.geometry.rotation import matrix_to_axis_angle
from src.hand.skeleton import HandArrays

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass
class Hands:
    """N hands as numpy arrays (float32 unless noted), each in the camera of its own image and of its own side.

    `vert_cam` is the hand model posed with `mano_pose` (flat_hand_mean=True) and `mano_shape`, with its wrist joint at
    `root_cam`. A left hand is the mirror image of the right-hand model: its pose is that of a left hand (MANO_LEFT).
    """

    image_index: np.ndarray  # [N] int: index of the image
    is_right: np.ndarray  # [N] bool
    box: np.ndarray  # [N, 4] xyxy px
    focal: np.ndarray  # [N, 2] px
    princpt: np.ndarray  # [N, 2] px
    joint_cam: np.ndarray  # [N, J, 3] mm
    joint_img: np.ndarray  # [N, J, 2] px of the image
    vert_cam: np.ndarray  # [N, V, 3] mm
    root_cam: np.ndarray  # [N, 3] mm, the wrist: the hand's translation in the camera
    mano_pose: np.ndarray  # [N, 48] axis-angle, root first
    mano_shape: np.ndarray  # [N, 10]
    faces: np.ndarray  # [F, 3] int, outward on a right hand

    def __len__(self) -> int:
        return len(self.image_index)

    def faces_of(self, hand: int) -> np.ndarray:
        """[F, 3] faces of one hand, outward by the right-hand rule: mirroring reverses their orientation."""
        return self.faces if self.is_right[hand] else self.faces[:, ::-1]

    def select(self, chosen: np.ndarray) -> Hands:
        """The hands that an index or mask [N] selects."""
        per_hand = (f.name for f in fields(self) if f.name != "faces")
        return Hands(**{name: getattr(self, name)[chosen] for name in per_hand}, faces=self.faces)


@dataclass(frozen=True)
class Predictor:
    """A trained network that predicts hands in whole images."""

    loaded: LoadedNetwork

    @classmethod
    def load(
        cls, path: str | Path, hand_model: str | Path | HandArrays | None = None, device: torch.device | str = "cpu"
    ) -> Predictor:
        """From a checkpoint; arguments and errors as of `load_network`."""
        return cls(load_network(path, hand_model, device))

    @torch.inference_mode()
    def predict(
        self,
        images: Sequence[np.ndarray],
        boxes: Sequence[ArrayLike] | None = None,
        focal: ArrayLike | None = None,
        princpt: ArrayLike | None = None,
        is_right: bool | Sequence[ArrayLike] = True,
        batch_size: int = 16,
    ) -> Hands:
        """Predict the hands in images, each in its image's camera.

        Args:
            images: M arrays [H, W, 3] uint8 RGB, of any sizes.
            boxes: for each image [4] or [n, 4], xyxy px around a hand's joints; None: each image is a crop of one hand.
            focal: px; a number or [2] for all images, or [M, 2]; None assumes the image's diagonal.
            princpt: px; [2] for all images, or [M, 2]; None is the image's centre.
            is_right: a bool for all hands, or for each image a bool or [n].
            batch_size: hands that go through the network at once.

        Returns:
            Hands, in the order of the boxes; `image_index` gives the image of each.

        Raises:
            ValueError: naming the image that is invalid, or whose box or camera is.
        """
        aims, owner = _aims_at_hands(images, boxes, focal, princpt, is_right, self.loaded.crop)
        net = self.loaded.network
        parts = [_no_hands(net.hand.num_vertex)]
        for start in range(0, len(aims), batch_size):
            some = range(start, min(start + batch_size, len(aims)))
            views = [view_of_patch(aims[i], net.img_size) for i in some]
            patch = np.stack([warp_image(images[owner[i]], view, net.img_size) for i, view in zip(some, views)])
            camera = np.array([[(view.focal, view.focal), view.princpt] for view in views], np.float32)
            inputs = (torch.from_numpy(patch).permute(0, 3, 1, 2), *torch.from_numpy(camera).unbind(1))
            prediction = net.predict_patch(*(value.to(net.centre.device) for value in inputs))
            parts.append(_to_source(prediction, [aims[i] for i in some], views))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return Hands(image_index=np.array(owner, np.int64), **joined, faces=net.hand.faces.cpu().numpy())


def whole_image_box(width: int, height: int, crop: float) -> np.ndarray:
    """[4] the box whose patch shows exactly the whole image, for images that are crops of one hand already."""
    half = 0.5 * max(width, height) / crop
    centre = np.array([0.5 * (width - 1), 0.5 * (height - 1)])
    return np.concatenate([centre - half, centre + half])


def _aims_at_hands(
    images: Sequence[np.ndarray],
    boxes: Sequence[ArrayLike] | None,
    focal: ArrayLike | None,
    princpt: ArrayLike | None,
    is_right: bool | Sequence[ArrayLike],
    crop: float,
) -> tuple[list[Aim], list[int]]:
    """One Aim per hand and the index of its image; arguments and errors as of `Predictor.predict`."""
    if boxes is None:
        boxes = [whole_image_box(*image.shape[1::-1], crop) for image in images]
    one_side = isinstance(is_right, (bool, np.bool_))
    for name, value in (("boxes", boxes), ("is_right", images if one_side else is_right)):
        if len(value) != len(images):
            raise ValueError(f"{name} has {len(value)} entries for {len(images)} images")
    aims, owner = [], []
    for index, image in enumerate(images):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            what = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"image {index} must be a uint8 array [H, W, 3] in RGB, not {what}")
        of_image = np.asarray(boxes[index], np.float64).reshape(-1, 4)
        side = np.broadcast_to(np.asarray(is_right if one_side else is_right[index], bool).reshape(-1), len(of_image))
        camera = _camera(index, image, len(images), focal, princpt)
        for box, right in zip(of_image, side, strict=True):
            if problem := box_problem(box, *image.shape[1::-1]):
                raise ValueError(f"image {index}: {problem}")
            aims.append(Aim(box, *camera, bool(right), crop))
            owner.append(index)
    return aims, owner


def box_problem(box: np.ndarray, width: int, height: int) -> str | None:
    """Why a box [4] px is invalid in an image of this size; None if it is valid. It may extend beyond the edge."""
    x0, y0, x1, y1 = box.tolist()
    if not np.isfinite(box).all() or x1 <= x0 or y1 <= y0:
        return f"the box {box.tolist()} must be [x0, y0, x1, y1] px with x0 < x1 and y0 < y1"
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        return f"the box {box.tolist()} is outside the image of {width} x {height} px"
    return None


def _camera(
    index: int, image: np.ndarray, num_image: int, focal: ArrayLike | None, princpt: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """focal [2] and princpt [2] px of one image."""
    camera = []
    guess = guess_intrinsics(*image.shape[1::-1])
    for name, value, fallback in (("focal", focal, guess[0]), ("princpt", princpt, guess[1])):
        array = np.asarray(fallback if value is None else value, np.float64)
        if array.shape not in ((), (2,), (num_image, 2)) or (name == "princpt" and array.ndim == 0):
            raise ValueError(f"{name} must be [2] px for all images or [{num_image}, 2], not {list(array.shape)}")
        camera.append(np.broadcast_to(array[index] if array.ndim == 2 else array, 2))
    if not (np.isfinite(camera).all() and (camera[0] > 0).all()):
        raise ValueError(f"image {index}: invalid camera, focal {camera[0].tolist()}, princpt {camera[1].tolist()} px")
    return camera[0], camera[1]


def _no_hands(num_vertex: int) -> dict[str, np.ndarray]:
    """The result of `_to_source` for an empty batch."""
    shape = {"box": (4,), "focal": (2,), "princpt": (2,), "joint_cam": (NUM_JOINT, 3), "joint_img": (NUM_JOINT, 2)}
    shape |= {"vert_cam": (num_vertex, 3), "root_cam": (3,), "mano_pose": (NUM_POSE,), "mano_shape": (NUM_SHAPE,)}
    return {"is_right": np.zeros(0, bool)} | {name: np.zeros((0, *of), np.float32) for name, of in shape.items()}


def _to_source(prediction: Prediction, aims: Sequence[Aim], views: Sequence[PatchView]) -> dict[str, np.ndarray]:
    """From the patch cameras, where all hands are right, to the images' cameras and the hands' own sides."""
    back = torch.from_numpy(np.stack([view.cam_rot.T for view in views])).float()
    rotmat = prediction.mano_rotmat.float().cpu()
    root_pose = matrix_to_axis_angle(back @ rotmat[:, 0])
    pose = torch.cat([root_pose, prediction.mano_pose.float().cpu()[:, 3:]], dim=1).numpy()
    is_right = np.array([aim.is_right for aim in aims])
    mirror = np.where(is_right[:, None], 1.0, MIRROR).astype(np.float32)[:, None]  # [N, 1, 3]

    def to_source(point: torch.Tensor) -> np.ndarray:
        return (point.float().cpu() @ back.transpose(1, 2)).numpy() * mirror

    joint_cam = to_source(prediction.joint_cam)
    given = {n: np.stack([getattr(a, n) for a in aims]).astype(np.float32) for n in ("box", "focal", "princpt")}
    return {
        "is_right": is_right,
        **given,
        "joint_cam": joint_cam,
        "joint_img": project(joint_cam, given["focal"], given["princpt"]),
        "vert_cam": to_source(prediction.vert_cam),
        "root_cam": to_source(prediction.root_cam[:, None])[:, 0],
        "mano_pose": np.where(is_right[:, None], pose, mirror_pose(pose)).astype(np.float32),
        "mano_shape": prediction.mano_shape.float().cpu().numpy(),
    }
