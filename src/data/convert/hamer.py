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
A hand has MANO only if both has_hand_pose and has_betas are set, as in HaMeR's own training.

`data_source` is the folder's name; the MANO convention is checked for each folder (tolerance 12 mm: in some folders, as
in InterHand2.6M, the joints were annotated and not taken from MANO).
docs/DATA.md lists what is untested without the download.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from src.data.convert.annotate import MM_PER_M, fields_mano, finite, known_only, plain_key, tight_box, visible_joints
from src.data.convert.chunk import Chunk, Job, Records, Request, attempt
from src.data.image import image_info
from src.data.shards.errors import SampleError
from src.data.shards.safe_parse import parse_pickle
from src.data.shards.tar import CorruptRegion, TarReader, split_name
from src.data.shards.writer import HandRecord

SPLITS = ("all",)
TOLERANCE_MM = 12.0
MIN_TIGHT_JOINT = 15
_IMAGES = ("jpg", "jpeg", "png")


def plan_hamer(request: Request) -> Job:
    """One chunk for each tar below the input, or below the folder that `split` names.

    Raises:
        ValueError: there is no tar to convert.
    """
    made = request.output.resolve()
    tars = [p for p in sorted(request.input.glob("**/*.tar")) if made not in p.resolve().parents]
    tars = [p for p in tars if not p.name.startswith(".")]  # macOS's ._000000.tar
    tars = [p for p in tars if request.split in ("all", p.resolve().parent.name)]
    if not tars:
        what = "" if request.split == "all" else f"{request.split}/"
        raise ValueError(
            f"--input {request.input}: contains no {what}*.tar; pass the folder of HaMeR's sets "
            "(freihand-train, ...), and as --split the name of one set, or all"
        )
    chunks = []
    for path in tars:
        subset = path.resolve().parent.name
        name = (path.parent.relative_to(request.input) / path.stem).as_posix()
        chunks.append(Chunk(name, 1, read_hands, (path, subset)))
    return Job("hamer", chunks, TOLERANCE_MM, left_file_shape=True)


def read_hands(path: Path, subset: str) -> Records:
    """The hands of each image of a tar, in order; corrupt members are skipped."""
    for key, members in _samples(path):
        if isinstance(members, str):
            yield SampleError(members, f"{path} at {key or 'an unknown member'}")
            continue
        hands = attempt(_read_image, key, members)
        if isinstance(hands, SampleError):
            yield hands
            continue
        for number, hand in enumerate(hands):
            yield attempt(_read_hand, subset, key, number, *hand)


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


def _read_image(key: str, members: dict[str, bytes]) -> list[tuple[dict[str, Any], bytes, str, tuple[int, int]]]:
    """(annotations, encoded image, jpg or png, (width, height)) for each hand of an image."""
    image = next((members[kind] for kind in _IMAGES if kind in members), None)
    if image is None or "data.pyd" not in members:
        raise SampleError("missing_member", key)
    hands = parse_pickle(members["data.pyd"])
    if not isinstance(hands, list) or not all(isinstance(hand, dict) for hand in hands):
        raise SampleError("bad_pickle", f"{key}: data.pyd is not a list of dicts")
    info = image_info(image)
    return [(hand, image, *info) for hand in hands]


def _points(hand: dict[str, Any], name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(points [21, width - 1], known [21]) of an array whose last column is a confidence."""
    value = np.asarray(hand.get(name))
    if value.dtype.kind not in "biuf" or value.shape != (21, width):
        raise SampleError("wrong_shape", f"{name} is {value.shape} of {value.dtype}, not (21, {width})")
    known = (value[:, -1] > 0) & np.isfinite(value).all(axis=1)
    return np.where(known[:, None], value[:, :-1], 0).astype(np.float64), known


def _box(hand: dict[str, Any], joint_img: np.ndarray, valid: np.ndarray) -> np.ndarray:
    if (valid > 0).sum() >= MIN_TIGHT_JOINT:
        return tight_box(joint_img, valid)
    center, half = finite("center", hand.get("center"), (2,)), 100.0 * finite("scale", hand.get("scale"), (2,))
    box = np.concatenate([center - half, center + half])
    if (half < 0.5).any():
        raise SampleError("small_box")
    return box


def _flag(hand: dict[str, Any], name: str) -> bool:
    return bool(finite(name, hand.get(name, 0), (1,))[0] > 0)


def _read_hand(
    subset: str, key: str, number: int, hand: dict[str, Any], image: bytes, image_type: str, size: tuple[int, int]
) -> HandRecord:
    joint_img, known_2d = _points(hand, "keypoints_2d", 3)
    valid = visible_joints(joint_img, size, known_2d)
    has_3d = hand.get("keypoints_3d") is not None
    joint_cam, known_3d = _points(hand, "keypoints_3d", 4) if has_3d else (np.zeros((21, 3)), np.zeros(21, bool))
    has_mano = _flag(hand, "has_hand_pose") and _flag(hand, "has_betas")
    if not (valid.any() or has_mano or known_3d.any()):
        raise SampleError("no_valid_joint")
    has_3d = bool(known_3d.any())
    return HandRecord(
        key=plain_key(subset, key, number),
        image=image,
        image_type=image_type,
        handedness="right" if finite("right", hand.get("right", 1), (1,))[0] > 0 else "left",
        data_source=subset,
        hand_bbox=_box(hand, joint_img, valid),
        joint_img=known_only(joint_img, valid),
        joint_2d_valid=valid,
        joint_cam=joint_cam * MM_PER_M if has_3d else None,
        joint_3d_valid=known_3d.astype(np.float32) if has_3d else None,
        **fields_mano(
            finite("hand_pose", hand.get("hand_pose"), (48,)) if has_mano else None,
            finite("betas", hand.get("betas"), (10,)) if has_mano else None,
            flat_hand_mean=True,
        ),
        extra={"image_path": f"{key}.{image_type}", "source_index": number},
    )
