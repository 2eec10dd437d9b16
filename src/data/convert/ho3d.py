"""HO-3D v3 (Hampali et al., 2021; v2's png images are read too) -> native shards. Right hands holding objects.

Official files:

    train.txt, evaluation.txt             one "SEQUENCE/0000" a line
    {split}/SEQUENCE/rgb/0000.jpg         640x480 (png in v2)
    {split}/SEQUENCE/meta/0000.pkl        a Python 2 pickle of a dict
    evaluation_xyz.json                   [N][21][3], released in 2024: the joints of evaluation.txt's frames
    evaluation_verts.json                 [N][778][3], not used: native shards contain no vertices

Keys read: handJoints3D, handPose [48], handBeta [10], camMat [3, 3]; in the evaluation split handJoints3D [3] is only
the wrist, and there is handBoundingBox [4] xyxy px. The pickles are parsed, never unpickled
(src/utils/restricted_pickle.py).

Read from the official repository (github.com/shreyashampali/ho3d: vis_HO3D.py, utils/vis_utils.py): joints and
translation are in metres in OpenGL's camera frame (y up, z backward), so y and z change sign here and the MANO root is
rotated accordingly; the 21 joints are MANO's 16, then the tips from thumb to pinky; the pose is axis-angle and absolute
(flat_hand_mean=True); all hands are right hands; frames without annotation hold None. eval.py and pred.py: the released
joints are in the same frame, unit and joint order, one entry for each line of evaluation.txt. That is checked on every
frame: their wrist must be handJoints3D. Evaluation frames keep handBoundingBox as their box, the challenge's input.

docs/DATA.md lists what is untested without the download.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from src.data.convert.annotate import (
    MANO_21,
    MM_PER_M,
    OPENGL_TO_OPENCV,
    fields_mano,
    finite,
    given_box,
    known_only,
    load_list,
    plain_key,
    project_mm,
    read_image,
    tight_box,
    turn_root,
    visible_joints,
)
from src.data.convert.chunk import Chunk, Job, Request, attempt, attempt_each, chunks_of
from src.data.convert.mano_check import OWN_JOINTS_MM
from src.data.shards.errors import SampleError
from src.data.shards.safe_parse import parse_pickle
from src.data.shards.writer import HandRecord
from src.utils.files import is_hidden

SPLITS = ("train", "evaluation")
WRIST_MM = 1.0  # rounding; the wrist of another frame, unit or camera frame is farther away
_NUM_WRIST_CHECK = 64


def plan_ho3d(request: Request) -> Job:
    """One split; a shard has at most `num_per_shard` consecutive frames of one sequence.

    Raises:
        ValueError: the input is not an HO-3D folder, or evaluation_xyz.json does not fit evaluation.txt.
    """
    folder = request.input / request.split
    if not folder.is_dir():
        raise ValueError(f"--input {request.input}: contains no folder {request.split}; pass the folder of HO-3D_v3")
    chunks: list[Chunk] = []
    read = partial(attempt_each, partial(_read_hand, folder, request.split))
    names = _names(request.input, request.split)
    released, note = _released(request.input, names) if request.split == "evaluation" else ({}, ())
    for sequence, group in groupby(sorted(set(names)), key=lambda name: name.partition("/")[0]):
        work = [(sequence, name.partition("/")[2], released.get(name)) for name in group]
        chunks += chunks_of(read, work, request.num_per_shard, len(chunks))
    return Job("ho3d", chunks, OWN_JOINTS_MM, sides=("right",), note=note)


def _names(root: Path, split: str) -> list[str]:
    """SEQUENCE/FRAME of each frame, in the order of the official list; from the folders if there is no list."""
    listing = root / f"{split}.txt"
    if not listing.is_file():
        metas = (path for path in (root / split).glob("*/meta/*.pkl") if not is_hidden(path))
        return [f"{path.parts[-3]}/{path.stem}" for path in metas]
    names = listing.read_text(encoding="utf-8").split()
    for name in names:
        if not name.partition("/")[2]:
            raise ValueError(f"{listing}: the line {name!r} is not SEQUENCE/FRAME; download the list again")
    return names


def _released(root: Path, names: list[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The released evaluation joints by SEQUENCE/FRAME, and lines to print.

    Raises:
        ValueError: the file does not fit evaluation.txt, in length or at one of the frames looked at.
    """
    path, listing, verts = (root / f"evaluation{end}" for end in ("_xyz.json", ".txt", "_verts.json"))
    note = [f"ho3d: {verts.name} is not used"] if verts.is_file() else []
    if not path.is_file():
        note.append(
            f"ho3d: {path.name} (linked in github.com/shreyashampali/ho3d) is missing beside {listing.name}: only the "
            "wrist is in 3D"
        )
        return {}, tuple(note)
    values = load_list(path)
    if not listing.is_file():
        raise ValueError(f"{path}: {listing.name}, which has the order of the entries, is missing beside it")
    if len(values) != len(names):
        raise ValueError(
            f"{path}: {len(values)} entries, but {listing.name} lists {len(names)} frames; "
            "pass both files of the same version (v2: 11524, v3: 20137)"
        )
    for number in range(0, len(names), len(names) // _NUM_WRIST_CHECK + 1):
        meta = attempt(_read_meta, root / "evaluation", *names[number].split("/", 1))
        found = meta if isinstance(meta, SampleError) else attempt(_released_joints, meta, values[number])
        if isinstance(found, SampleError) and found.reason == "wrist_mismatch":
            raise ValueError(
                f"{path}: entry {number} is not {names[number]}, line {number + 1} of {listing.name}: {found.detail}"
            )
    return dict(zip(names, values, strict=True)), tuple(note)


def _released_joints(meta: dict[str, Any], entry: Any) -> np.ndarray:
    """[21, 3] m from an entry of evaluation_xyz.json. Raises SampleError: wrist_mismatch, or as `finite`."""
    joint, wrist = finite("evaluation_xyz", entry, (21, 3)), finite("handJoints3D", meta.get("handJoints3D"), (3,))
    if (gap := MM_PER_M * float(np.linalg.norm(joint[0] - wrist))) > WRIST_MM:
        raise SampleError("wrist_mismatch", f"its wrist is {gap:.1f} mm from handJoints3D of the meta file")
    return joint


def _read_meta(folder: Path, sequence: str, frame: str) -> dict[str, Any]:
    path = folder / sequence / "meta" / f"{frame}.pkl"
    try:
        meta = parse_pickle(path.read_bytes())
    except OSError:
        raise SampleError("missing_annotation", str(path)) from None
    if not isinstance(meta, dict):
        raise SampleError("bad_pickle", f"{path} is not a dict")
    return meta


def _read_hand(folder: Path, split: str, sequence: str, frame: str, released: Any) -> HandRecord:
    meta = _read_meta(folder, sequence, frame)
    joint = meta.get("handJoints3D") if released is None else _released_joints(meta, released)
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
    has_mano = meta.get("handPose") is not None and meta.get("handBeta") is not None
    pose = turn_root(finite("handPose", meta["handPose"], (48,)), OPENGL_TO_OPENCV) if has_mano else None
    if split == "evaluation":
        box = given_box(finite("handBoundingBox", meta.get("handBoundingBox"), (4,)), size)
    else:
        box = tight_box(joint_img, valid)
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
