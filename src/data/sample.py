"""From one frame of a Clip to a Sample, with the guess where no intrinsics are known."""

from __future__ import annotations

import numpy as np

from src.batch import Sample
from src.data.shards.annotation import Clip
from src.data.shards.errors import SampleError
from src.geometry.camera import guess_intrinsics

_NO_IMAGE = np.empty((0, 0, 3), np.uint8)


def make_sample(clip: Clip, frame: int, image: np.ndarray, key: str, hand_model: str) -> Sample:
    """One frame as a Sample; `image` is [H, W, 3] uint8 RGB. The rest as in `annotated_sample`."""
    sample = annotated_sample(clip, frame, image.shape[1::-1], key, hand_model)
    sample.image = image
    return sample


def annotated_sample(clip: Clip, frame: int, size: tuple[int, int], key: str, hand_model: str) -> Sample:
    """One frame as a Sample whose image is still to come.

    Args:
        clip: annotations of the clip; size: (width, height) of the frame's image; key: of the tar sample.
        hand_model: the one the run uses; parameters of another model are no target (has_mano 0).

    Raises:
        SampleError: the reason in `clip.bad_frame`, or bad_bbox for a box that lies outside of the image.
    """
    if frame in clip.bad_frame:
        raise SampleError(clip.bad_frame[frame], f"frame {frame}")
    width, height = size
    box = clip.hand_bbox[frame]
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        raise SampleError("bad_bbox", f"{box.tolist()} lies outside of the {width}x{height} image")
    has_intr, has_mano = bool(clip.has_intr[frame]), bool(clip.has_mano[frame]) and clip.hand_model == hand_model
    is_stated = clip.focal[frame, 0] > 0  # real, or virtual: the camera that the 3D of this set was made for
    focal, princpt = (clip.focal[frame], clip.princpt[frame]) if is_stated else guess_intrinsics(width, height)
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
