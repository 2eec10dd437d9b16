"""DexYCB (Chao et al., CVPR 2021) -> native shards. One hand per image, right or left; 8 cameras, 1,000 sequences.

Official files:

    20200709-subject-01/20200709_141754/meta.yml             serials, num_frames, mano_sides, mano_calib
    .../{serial}/color_%06d.jpg, labels_%06d.npz             640x480; pose_m [1, 51], joint_3d [1, 21, 3] m
    calibration/intrinsics/{serial}_640x480.yml              color: fx, fy, ppx, ppy
    calibration/mano_{mano_calib}/mano.yml                   betas [10]

Read from the official toolkit (github.com/NVlabs/dex-ycb-toolkit: README.md, dex_ycb_toolkit/dex_ycb.py, layers/
mano_layer.py, issue 28): joints are in OpenPose order and the camera frame, all -1 if no hand is visible (pose_m is
then 0); a single joint of -1 is unknown. pose_m is 3 axis-angle, 45 coefficients of MANO's full pose basis, 3
translation, with MANO's mean pose added (flat_hand_mean=False); the setups s0-s3 select by subject, camera and sequence
number. Left hands were fitted with MANO_LEFT as published, before its unmirrored shape directions were known;
mano_check.py converts those betas.

Angles = coefficients @ hands_components, which only the user's MANO file has: without --mano no MANO is written.
For left hands the components are those of --mano_left if given, else the right ones mirrored (axis-angle y, z negated);
if that is wrong, the check drops the parameters of left hands.
Every array of labels_*.npz is read without pickle; object arrays are refused.
docs/DATA.md lists what is untested without the download.
"""

from __future__ import annotations

import io
import zipfile
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from src.data.convert.annotate import MM_PER_M, fields_mano, fields_seen, finite, plain_key, read_image
from src.data.convert.chunk import Chunk, Job, Request, attempt_each
from src.data.convert.dexycb_split import SETUPS, choose_sequences
from src.data.shards.errors import SampleError
from src.data.shards.safe_parse import parse_npy
from src.data.shards.writer import HandRecord
from src.geometry.patch import mirror_pose
from src.hand.mano_file import load_pose_components

SPLITS = (
    "s1/train",
    *(f"{s}/{p}" for s in SETUPS for p in ("train", "val", "test") if (s, p) != ("s1", "train")),
    "all",
)
TOLERANCE_MM = 3.0
_MAX_ARRAY = 1 << 16  # bytes; DexYCB has no larger ones


def plan_dexycb(request: Request) -> Job:
    """One part of one setup (or "all"), a chunk for each sequence: camera after camera, frames in order.

    Raises:
        ValueError: the input is not a DexYCB folder, lacks sequences of the setup, or --mano has no pose components.
    """
    sequences, serials = choose_sequences(request.input, request.split)
    components: dict[str, np.ndarray] = {}
    if request.mano:
        components["right"] = load_pose_components(request.mano)
        components["left"] = mirror_pose(components["right"])
    if request.mano_left:
        components["left"] = load_pose_components(request.mano_left)
    chunks = []
    for sequence in sequences:
        keys = ("serials", "num_frames", "mano_sides", "mano_calib")
        cameras, num_frame, (side, *_), (calibration, *_) = _values(request.input / sequence / "meta.yml", *keys)
        (betas,) = _values(request.input / "calibration" / f"mano_{calibration}" / "mano.yml", "betas")
        lens = {str(c): _lens(request.input, str(c)) for c in cameras if serials is None or str(c) in serials}
        read = partial(_read_hand, request.input, side, betas, components.get(side))
        folders = {Path(sequence) / serial: lens[serial] for serial in lens}
        work = [(folder, camera, frame) for folder, camera in folders.items() for frame in range(int(num_frame))]
        chunks.append(Chunk(f"{len(chunks):06d}", len(work), attempt_each, (read, work)))
    without = "no MANO parameters are written: DexYCB stores coefficients of your MANO file's pose basis; pass --mano"
    return Job("dexycb", chunks, TOLERANCE_MM, left_file_shape=True, without_mano=without)


def _values(path: Path, *keys: str) -> list[Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path}: missing; unpack this sequence and calibration.tar.gz of DexYCB again") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: does not parse ({error}); unpack it again") from None
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise ValueError(f"{path}: lacks one of the keys {', '.join(keys)}; unpack it again")
    return [content[key] for key in keys]


@lru_cache(maxsize=64)
def _lens(root: Path, serial: str) -> tuple[np.ndarray, np.ndarray]:
    """(focal [2], princpt [2]) px of a camera."""
    path = root / "calibration" / "intrinsics" / f"{serial}_640x480.yml"
    (color,) = _values(path, "color")
    try:
        return np.array([color["fx"], color["fy"]], float), np.array([color["ppx"], color["ppy"]], float)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: color lacks fx, fy, ppx or ppy; unpack calibration.tar.gz again") from None


def read_labels(path: Path) -> dict[str, np.ndarray]:
    """joint_3d and pose_m of a labels file, without numpy's own reader (which could unpickle).

    Raises:
        SampleError: missing_annotation, bad_npz, object_array or another of parse_npy.
    """
    try:
        data = path.read_bytes()
    except OSError:
        raise SampleError("missing_annotation", str(path)) from None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            content = {name: archive.open(f"{name}.npy").read(_MAX_ARRAY) for name in ("joint_3d", "pose_m")}
    except Exception as error:  # zipfile and its decompressors raise many kinds
        raise SampleError("bad_npz", f"{path} ({error})") from None
    return {name: parse_npy(array) for name, array in content.items()}


def _read_hand(
    root: Path,
    side: str,
    betas: list[float],
    components: np.ndarray | None,
    folder: Path,
    lens: tuple[np.ndarray, np.ndarray],
    frame: int,
) -> HandRecord:
    label = read_labels(root / folder / f"labels_{frame:06d}.npz")
    joint = finite("joint_3d", label["joint_3d"], (21, 3))
    known = (joint != -1).any(axis=1)
    if not known.any():
        raise SampleError("no_hand")
    image, image_type, size = read_image(root / folder / f"color_{frame:06d}.jpg")
    coefficient = finite("pose_m", label["pose_m"], (51,))
    has_mano = components is not None and bool(coefficient.any())
    pose = np.concatenate([coefficient[:3], coefficient[3:48] @ components]) if has_mano else None
    shape = finite("betas", betas, (10,)) if has_mano else None
    return HandRecord(
        key=plain_key("dexycb", *folder.parts, f"{frame:06d}"),
        image=image,
        image_type=image_type,
        handedness=side,
        data_source="dexycb",
        **fields_seen(joint * MM_PER_M, *lens, size, known),
        **fields_mano(pose, shape, flat_hand_mean=False),
        extra={"image_path": str(folder / f"color_{frame:06d}.jpg")},
    )
