"""From one frame of a Clip and its encoded image to a Sample: decoding, and the guess where no intrinsics are known."""

from __future__ import annotations

import cv2
import numpy as np

from src.batch import Sample
from src.data.blob import SampleError
from src.data.schema import Clip
from src.geometry.camera import guess_intrinsics

# An EXIF orientation is ignored: annotations refer to the stored pixels.
_DECODE = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def decode_image(data: bytes | memoryview) -> np.ndarray:
    """[H, W, 3] uint8 RGB as stored.

    Raises:
        SampleError: undecodable_image.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _DECODE)
    except cv2.error:
        image = None
    if image is None:
        raise SampleError("undecodable_image", f"{len(data)} bytes do not decode")
    return image


def make_sample(clip: Clip, frame: int, image: np.ndarray, key: str, hand_model: str) -> Sample:
    """One frame as a Sample.

    Args:
        clip: annotations of the clip; image: [H, W, 3] uint8 RGB of the frame; key: of the tar sample.
        hand_model: the one the run uses; parameters of another model are no target (has_mano 0).

    Raises:
        SampleError: the reason in `clip.bad_frame`, or bad_bbox for a box that lies outside of the image.
    """
    if frame in clip.bad_frame:
        raise SampleError(clip.bad_frame[frame], f"frame {frame}")
    height, width = image.shape[:2]
    box = clip.hand_bbox[frame]
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        raise SampleError("bad_bbox", f"{box.tolist()} lies outside of the {width}x{height} image")
    has_intr, has_mano = bool(clip.has_intr[frame]), bool(clip.has_mano[frame]) and clip.hand_model == hand_model
    focal, princpt = (clip.focal[frame], clip.princpt[frame]) if has_intr else guess_intrinsics(width, height)
    return Sample(
        key=f"{key}/{frame}",
        source=clip.source,
        image=image,
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
