"""HO-3D v3 (Hampali et al., 2021; v2's png images are read too) -> native shards. Right hands holding objects.

Official files:

    train.txt, evaluation.txt             one "SEQUENCE/0000" a line
    {split}/SEQUENCE/rgb/0000.jpg         640x480 (png in v2)
    {split}/SEQUENCE/meta/0000.pkl        a Python 2 pickle of a dict

Keys read: handJoints3D, handPose [48], handBeta [10], camMat [3, 3]; in the evaluation split handJoints3D [3] is only
the wrist, and there is handBoundingBox [4] xyxy px. The pickles are parsed, never unpickled
(src/utils/restricted_pickle.py).

Read from the official repository (github.com/shreyashampali/ho3d: vis_HO3D.py, utils/vis_utils.py): joints and
translation are in metres in OpenGL's camera frame (y up, z backward), so y and z change sign here and the MANO root is
rotated accordingly; the 21 joints are MANO's 16, then the tips from thumb to pinky; the pose is axis-angle and absolute
(flat_hand_mean=True); all hands are right hands; frames without annotation hold None.

Only the meta files are used, not the evaluation joints that were published after the challenge. docs/DATA.md lists what
is untested without the download.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from src.data.convert.annotate import (
    MANO_21,
    MM_PER_M,
    OPENGL_TO_OPENCV,
    fields_mano,
    finite,
    known_only,
    plain_key,
    project_mm,
    read_image,
    tight_box,
    turn_root,
    visible_joints,
)
from src.data.convert.chunk import Chunk, Job, Request, attempt_each, chunks_of
from src.data.shards.errors import SampleError
from src.data.shards.safe_parse import parse_pickle
from src.data.shards.writer import HandRecord

SPLITS = ("train", "evaluation")
TOLERANCE_MM = 1.0  # the published joints are the model's own


def plan_ho3d(request: Request) -> Job:
    """One split; a shard has at most `num_per_shard` consecutive frames of one sequence.

    Raises:
        ValueError: the input is not an HO-3D folder.
    """
    folder = request.input / request.split
    if not folder.is_dir():
        raise ValueError(f"--input {request.input}: contains no folder {request.split}; pass the folder of HO-3D_v3")
    chunks: list[Chunk] = []
    read = partial(attempt_each, partial(_read_hand, folder, request.split))
    for sequence, frames in sorted(_frames(request.input, request.split).items()):
        work = [(sequence, frame) for frame in frames]
        chunks += chunks_of(read, work, request.num_per_shard, len(chunks))
    return Job("ho3d", chunks, TOLERANCE_MM, sides=("right",))


def _frames(root: Path, split: str) -> dict[str, list[str]]:
    """Sequence -> its frames in order, from the official list, or from the folders if there is no list."""
    listing = root / f"{split}.txt"
    if listing.is_file():
        names = listing.read_text(encoding="utf-8").split()
    else:
        names = [f"{path.parts[-3]}/{path.stem}" for path in (root / split).glob("*/meta/[!.]*.pkl")]
    frames: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        sequence, _, frame = name.partition("/")
        if not frame:
            raise ValueError(f"{listing}: the line {name!r} is not SEQUENCE/FRAME; download the list again")
        frames.setdefault(sequence, []).append(frame)
    return frames


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = parse_pickle(path.read_bytes())
    except OSError:
        raise SampleError("missing_annotation", str(path)) from None
    if not isinstance(meta, dict):
        raise SampleError("bad_pickle", f"{path} is not a dict")
    return meta


def _read_hand(folder: Path, split: str, sequence: str, frame: str) -> HandRecord:
    meta = _read_meta(folder / sequence / "meta" / f"{frame}.pkl")
    joint = meta.get("handJoints3D")
    only_wrist = joint is not None and np.size(joint) == 3
    camera = finite("camMat", meta.get("camMat"), (3, 3))
    focal, princpt = np.diag(camera)[:2], camera[:2, 2]
    joint_cam, known = np.zeros((21, 3)), np.zeros(21, np.float32)
    if only_wrist:
        joint_cam[0], known[0] = finite("handJoints3D", joint, (3,)), 1
    else:
        joint_cam, known = finite("handJoints3D", joint, (21, 3))[MANO_21], np.ones(21, np.float32)
    joint_cam = joint_cam @ OPENGL_TO_OPENCV * MM_PER_M
    path = next((p for kind in ("jpg", "png") if (p := folder / sequence / "rgb" / f"{frame}.{kind}").is_file()), None)
    if path is None:
        raise SampleError("missing_image", f"{sequence}/{frame}")
    image, image_type, size = read_image(path)
    joint_img = project_mm(joint_cam, focal, princpt)
    valid = visible_joints(joint_img, size, known)
    has_mano = not only_wrist and meta.get("handPose") is not None and meta.get("handBeta") is not None
    pose = turn_root(finite("handPose", meta["handPose"], (48,)), OPENGL_TO_OPENCV) if has_mano else None
    box = finite("handBoundingBox", meta.get("handBoundingBox"), (4,)) if only_wrist else tight_box(joint_img, valid)
    shape = finite("handBeta", meta["handBeta"], (10,)) if has_mano else None
    return HandRecord(
        key=plain_key("ho3d", split, sequence, frame),
        image=image,
        image_type=image_type,
        handedness="right",
        data_source="ho3d",
        hand_bbox=box,
        joint_img=known_only(joint_img, valid),
        joint_2d_valid=valid,
        joint_cam=known_only(joint_cam, known),
        joint_3d_valid=known,
        **fields_mano(pose, shape, flat_hand_mean=True),
        focal=focal,
        princpt=princpt,
        extra={"image_path": f"{split}/{sequence}/rgb/{path.name}", "source_split": split},
    )
