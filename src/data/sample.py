"""Makes a Sample from one frame of a Clip, with guessed intrinsics where they are unknown."""

from __future__ import annotations

import numpy as np

from src.batch import Sample
from src.data.shards.annotation import Clip, refuse_outside
from src.data.shards.errors import SampleError
from src.geometry.camera import guess_intrinsics

_NO_IMAGE = np.empty((0, 0, 3), np.uint8)


def make_sample(clip: Clip, frame: int, image: np.ndarray, key: str, hand_model: str) -> Sample:
    """One frame as a Sample with its image [H, W, 3] uint8 RGB; otherwise as `annotated_sample`."""
    sample = annotated_sample(clip, frame, image.shape[1::-1], key, hand_model)
    sample.image = image
    return sample


def annotated_sample(clip: Clip, frame: int, size: tuple[int, int], key: str, hand_model: str) -> Sample:
    """One frame as a Sample without its image.

    Args:
        clip: annotations of the clip; size: (width, height) of the frame's image; key: of the tar sample.
        hand_model: the run's hand model; MANO parameters of another model are not used (has_mano 0).

    Raises:
        SampleError: the reason in `clip.bad_frame`, or bad_bbox for a box outside the image.
    """
    if frame in clip.bad_frame:
        raise SampleError(*clip.bad_frame[frame])
    box = clip.hand_bbox[frame]
    refuse_outside(box, size)
    has_intr, has_mano = bool(clip.has_intr[frame]), bool(clip.has_mano[frame]) and clip.hand_model == hand_model
    is_stated = clip.focal[frame, 0] > 0  # a real camera, or the virtual one that the set's 3D refers to
    focal, princpt = (clip.focal[frame], clip.princpt[frame]) if is_stated else guess_intrinsics(*size)
    return Sample(
        key=f"{key}/{frame}",
        source=clip.source,
        image=_NO_IMAGE,
        is_right=clip.is_right,
        hand_bbox=box,
        joint_img=clip.joint_img[frame],
        joint_2d_valid=clip.joint_2d_valid[frame],
        joint_cam=clip.joint_cam[frame],
        joint_3d_valid=clip.joint_3d_valid[frame],
        mano_pose=clip.mano_pose[frame] * has_mano,
        mano_shape=clip.mano_shape[frame] * has_mano,
        has_mano=has_mano,
        flat_hand_mean=clip.flat_hand_mean,
        focal=focal,
        princpt=princpt,
        has_intr=has_intr,
    )
