"""HaMeR's public training tars (Pavlakos et al., CVPR 2024) -> native shards, without unpacking to disk.

Official files, as fetched by HaMeR's fetch_training_data.sh: folders such as freihand-train/ with 000000.tar, ...; a
sample has `jpg` and `data.pyd`, a pickled list with a dict for each hand of the image (the masks in `detection.npz`
are not used). Keys read: keypoints_2d [21, 3] px and confidence, keypoints_3d [21, 4] m and confidence, center [2] px,
scale [2] (box side = 200 scale), hand_pose [48], betas [10], has_hand_pose, has_betas, right, personid.
`data.pyd` is parsed, never unpickled (src/utils/restricted_pickle.py).

Read from the official repository (geopavlakos/hamer: hamer/datasets/image_dataset.py; issues 26 and 78 for the
authors' answers): joints are in OpenPose order; the pose is axis-angle and absolute (flat_hand_mean=True); images,
joints and parameters of left hands are stored as left hands (and mirrored on loading, axis-angle y and z negated),
which is this project's convention too. There are no intrinsics: has_intr is 0, and `joint_cam` is only known up to a
translation.
`hand_bbox` is the tight box of the visible joints if there are at least 15, else the set's own, wider box.

Unreliable labels are dropped by HaMeR's own filters, under its names (OPTIONS) and with the values it was trained with
(hamer/datasets/image_dataset.py, hamer/configs_hydra/data_filtering/low1.yaml). POSES_BETAS_SIMULTANEOUS is always on:
MANO is known only with both has_hand_pose and has_betas. SUPPRESS_BAD_POSES and FILTER_NO_POSES are off in that file
and not available here. Two differences: HaMeR weights its losses by the remaining confidences, but a keypoint is either
known or unknown here, so the threshold also applies to keypoints_3d; unknown betas get no target of 0 (BETAS_REG).

`data_source` is the folder's name; the MANO convention is checked for each folder (tolerance 12 mm: in some folders, as
in InterHand2.6M, the joints were annotated and not taken from MANO).
docs/DATA.md lists what is untested without the download.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from src.data.convert.annotate import (
    MM_PER_M,
    fields_mano,
    finite,
    given_box,
    known_only,
    plain_key,
    tight_box,
    visible_joints,
)
from src.data.convert.chunk import Chunk, Job, Option, Records, Request, attempt
from src.data.image import image_info
from src.data.shards.errors import SampleError
from src.data.shards.safe_parse import parse_pickle
from src.data.shards.tar import CorruptRegion, TarReader, split_name
from src.data.shards.writer import HandRecord
from src.utils.files import is_hidden

SPLITS = ("all",)
TOLERANCE_MM = 12.0
MIN_TIGHT_JOINT = 15
_IMAGES = ("jpg", "jpeg", "png")
OPTIONS = {
    "suppress_kp_conf_thresh": Option(0.3, "2D and 3D keypoints of a lower confidence are unknown; 0: off"),
    "suppress_betas_thresh": Option(3.0, "MANO parameters are unknown if any |beta| exceeds this; 0: off"),
    "filter_num_kp": Option(4, "skip hands with no more 2D keypoints than this; 0: off"),
    "filter_num_kp_thresh": Option(0.0, "the confidence above which filter_num_kp counts a keypoint"),
    "filter_reproj_thresh": Option(31000.0, "skip hands whose fit has a reprojection_loss of this or more; 0: off"),
    "filter_min_bbox_size": Option(0.0, "skip hands whose box (200 x scale) is not larger than this, in px; 0: off"),
}
Limits = dict[str, float]  # the values of OPTIONS


def plan_hamer(request: Request) -> Job:
    """One chunk for each tar below the input, or below the folder that `split` names.

    Raises:
        ValueError: there is no tar to convert.
    """
    made = request.output.resolve()
    tars = [p for p in sorted(request.input.glob("**/*.[tT][aA][rR]")) if p.is_file() and not is_hidden(p)]
    tars = [p for p in tars if made not in p.resolve().parents]
    tars = [p for p in tars if request.split in ("all", p.resolve().parent.name)]
    if not tars:
        what = "" if request.split == "all" else f"{request.split}/"
        raise ValueError(
            f"--input {request.input}: contains no {what}*.tar; pass the folder of HaMeR's sets "
            "(freihand-train, ...), and as --split the name of one set, or all"
        )
    limits = {name: option.default for name, option in OPTIONS.items()} | request.options
    chunks = []
    for path in tars:
        subset = path.resolve().parent.name
        name = (path.parent.relative_to(request.input) / path.stem).as_posix()
        chunks.append(Chunk(name, 1, read_hands, (path, subset, limits)))
    return Job("hamer", chunks, TOLERANCE_MM, left_file_shape=True)


def read_hands(path: Path, subset: str, limits: Limits) -> Records:
    """The hands of each image of a tar, in order; corrupt members are skipped.

    A lost image counts once for each of its hands, or once where their number is lost, too, as in a corrupt region.
    """
    for key, members in _samples(path):
        if isinstance(members, str):
            yield SampleError(members, f"{path} at {key or 'an unknown member'}")
            continue
        hands = attempt(_read_hands, key, members)
        if isinstance(hands, SampleError):
            yield hands
            continue
        image = attempt(_read_image, key, members)
        if isinstance(image, SampleError):
            yield from [image] * len(hands)
            continue
        for number, hand in enumerate(hands):
            yield attempt(_read_hand, subset, key, number, hand, image, limits)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes] | str]]:
    """(key, members by suffix) of each sample of a tar, or (name, reason) for a corrupt part."""
    key, members = "", {}
    with path.open("rb") as file:
        for item in TarReader(file, path.stat().st_size):
            if isinstance(item, CorruptRegion):
                yield item.name, f"damaged_{item.reason}"
                continue
            if item.problem:
                yield item.name, item.problem
                continue
            parts = split_name(item.name)
            if parts is None:
                continue
            if parts[0] != key:
                if members:
                    yield key, members
                key, members = parts[0], {}
            members[parts[1]] = item.data
    if members:
        yield key, members


def _read_hands(key: str, members: dict[str, bytes]) -> list[dict[str, Any]]:
    """The annotations of each hand of an image."""
    if "data.pyd" not in members:
        raise SampleError("missing_member", f"{key}: no data.pyd")
    hands = parse_pickle(members["data.pyd"])
    if not isinstance(hands, list) or not all(isinstance(hand, dict) for hand in hands):
        raise SampleError("bad_pickle", f"{key}: data.pyd is not a list of dicts")
    return hands


def _read_image(key: str, members: dict[str, bytes]) -> tuple[bytes, str, tuple[int, int]]:
    """(encoded image, jpg or png, (width, height))."""
    image = next((members[kind] for kind in _IMAGES if kind in members), None)
    if image is None:
        raise SampleError("missing_member", f"{key}: no image")
    return image, *image_info(image)


def _points(hand: dict[str, Any], name: str, width: int, limit: float) -> tuple[np.ndarray, np.ndarray, int]:
    """(points [21, width - 1], confidence [21], number of suppressed points) of an array whose last column is a
    confidence; below `limit`, and for points that are not finite, it is set to 0."""
    value = np.asarray(hand.get(name))
    if value.dtype.kind not in "biuf" or value.shape != (21, width):
        raise SampleError("wrong_shape", f"{name} is {value.shape} of {value.dtype}, not (21, {width})")
    given = np.where(np.isfinite(value).all(axis=1), value[:, -1], 0).clip(0)
    confidence = np.where(given < limit, 0, given)
    return known_only(value[:, :-1], confidence), confidence, int((given > confidence).sum())


def _box(hand: dict[str, Any], joint_img: np.ndarray, valid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if (valid > 0).sum() >= MIN_TIGHT_JOINT:
        return tight_box(joint_img, valid)
    center, half = finite("center", hand.get("center"), (2,)), 100.0 * finite("scale", hand.get("scale"), (2,))
    return given_box(np.concatenate([center - half, center + half]), size)


def _flag(hand: dict[str, Any], name: str) -> bool:
    return bool(finite(name, hand.get(name, 0), (1,))[0] > 0)


def _reprojection_loss(hand: dict[str, Any]) -> float | None:
    """extra_info.fitting_loss.reprojection_loss; None if the hand was not fitted."""
    info = hand.get("extra_info")
    losses = info.get("fitting_loss") if isinstance(info, dict) else None
    if isinstance(losses, list) and len(losses) == 1:  # an object array of one element
        losses = losses[0]
    loss = losses.get("reprojection_loss") if isinstance(losses, dict) else None
    return None if loss is None else float(finite("reprojection_loss", loss, (1,))[0])


def _filter(hand: dict[str, Any], confidence: np.ndarray, limits: Limits) -> None:
    """HaMeR's filters, in its order. Raises SampleError, with the option's name as the reason."""
    num_point = int((confidence > limits["filter_num_kp_thresh"]).sum())
    if 0 < limits["filter_num_kp"] >= num_point:
        raise SampleError("filter_num_kp", f"{num_point} keypoints")
    limit = limits["filter_reproj_thresh"]
    if limit > 0 and (loss := _reprojection_loss(hand)) is not None and loss >= limit:
        raise SampleError("filter_reproj_thresh", f"reprojection_loss {loss:.6g}")
    limit = limits["filter_min_bbox_size"]
    if limit > 0 and (side := 200 * finite("scale", hand.get("scale"), (2,)).min()) <= limit:
        raise SampleError("filter_min_bbox_size", f"box of {side:.6g} px")


def _mano(hand: dict[str, Any], limits: Limits) -> tuple[np.ndarray | None, np.ndarray | None, dict[str, int]]:
    """(pose [48], shape [10], parameters withheld by reason); pose and shape are known together, or neither is."""
    has_pose, has_betas = _flag(hand, "has_hand_pose"), _flag(hand, "has_betas")
    if not (has_pose and has_betas):
        return None, None, {"MANO by poses_betas_simultaneous": int(has_pose or has_betas)}
    pose, betas = finite("hand_pose", hand.get("hand_pose"), (48,)), finite("betas", hand.get("betas"), (10,))
    if 0 < limits["suppress_betas_thresh"] < np.abs(betas).max():
        return None, None, {"MANO by suppress_betas_thresh": 1}
    return pose, betas, {}


def _read_hand(
    subset: str,
    key: str,
    number: int,
    hand: dict[str, Any],
    image: tuple[bytes, str, tuple[int, int]],
    limits: Limits,
) -> HandRecord:
    encoded, image_type, size = image
    joint_img, confidence, few_2d = _points(hand, "keypoints_2d", 3, limits["suppress_kp_conf_thresh"])
    _filter(hand, confidence, limits)
    valid = visible_joints(joint_img, size, confidence)
    joint_cam, known_3d, few_3d = np.zeros((21, 3)), np.zeros(21), 0
    if hand.get("keypoints_3d") is not None:
        joint_cam, known_3d, few_3d = _points(hand, "keypoints_3d", 4, limits["suppress_kp_conf_thresh"])
    pose, shape, withheld = _mano(hand, limits)
    has_3d = bool(known_3d.any())
    if not (valid.any() or pose is not None or has_3d):
        raise SampleError("no_valid_joint")
    withheld |= {
        "keypoints_2d by suppress_kp_conf_thresh": few_2d,
        "keypoints_3d by suppress_kp_conf_thresh": few_3d,
    }
    return HandRecord(
        key=plain_key(subset, key, number),
        image=encoded,
        image_type=image_type,
        handedness="right" if finite("right", hand.get("right", 1), (1,))[0] > 0 else "left",
        data_source=subset,
        hand_bbox=_box(hand, joint_img, valid, size),
        joint_img=known_only(joint_img, valid),
        joint_2d_valid=valid,
        joint_cam=joint_cam * MM_PER_M if has_3d else None,
        joint_3d_valid=(known_3d > 0).astype(np.float32) if has_3d else None,
        **fields_mano(pose, shape, flat_hand_mean=True),
        extra={"image_path": f"{key}.{image_type}", "source_index": number},
        withheld=withheld,
    )
