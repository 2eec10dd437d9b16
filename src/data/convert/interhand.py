"""InterHand2.6M v1.0 (Moon et al., ECCV 2020), 5 or 30 fps -> native shards. Each hand in an image is one sample.

Official files; `{split}` is train, val or test:

    annotations/{split}/InterHand2.6M_{split}_data.json           images and annotations, COCO format; older releases
                                                                  have it in annotations/all/; joint_valid [42]
    annotations/{split}/InterHand2.6M_{split}_camera.json         [capture] campos mm, camrot, focal, princpt [camera]
    annotations/{split}/InterHand2.6M_{split}_joint_3d.json       [capture][frame] world_coord [42][3] mm, joint_valid
    annotations/{split}/InterHand2.6M_{split}_MANO_NeuralAnnot.json   [capture][frame][side] pose 48, shape 10, trans m
    images/{split}/Capture*/{sequence}/cam*/image*.jpg            512 px, undistorted

Read from the official repository (facebookresearch/InterHand2.6M: data/InterHand2.6M/dataset.py,
tool/MANO_world_to_camera/convert.py), the set's home page and mmpose's list of its keypoints: 21 right joints, then 21
left ones, each finger from its tip to the palm (thumb, index, middle, ring, pinky), the wrist last;
x_cam = camrot (x_world - campos); MANO is in the world frame, flat_hand_mean=False, left hands with the x of the shape
directions mirrored (so betas are those of the mirrored right hand).
Validity: joint_3d.json says whether a joint was annotated at all (otherwise its world_coord means nothing), data.json
whether it is also inside this image. 2D is the projection of world_coord, so a joint is known, in 2D and 3D, only where
both files say so; and if the wrist is unknown, so are all 3D joints of that hand.
The set's joints were annotated, not taken from MANO: its authors report about 5 mm between the two, hence the tolerance
of the check. `joint_cam` are the set's joints. The root of `mano_pose` is rotated into the camera frame.
The wrist is an annotated joint too, so placing the MANO hand at `joint_cam[0]` inherits that difference.

Memory: one process loads the json files of the split; expect 10 to 15 GB for train (val and test: below 3 GB).
docs/DATA.md lists what is untested without the download.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from src.data.convert.annotate import (
    fields_2d,
    fields_mano,
    finite,
    known_only,
    plain_key,
    project_mm,
    read_image,
    turn_root,
    visible_joints,
)
from src.data.convert.chunk import Job, Records, Request, attempt, chunks_of
from src.data.shards.errors import SampleError
from src.data.shards.writer import HandRecord

SPLITS = ("train", "val", "test")
TOLERANCE_MM = 12.0
# the set's order of one hand -> OpenPose order: the wrist, then each finger reversed
TO_OPENPOSE = np.array([20, *(4 * finger + joint for finger in range(5) for joint in (3, 2, 1, 0))])
_FIRST = {"right": 0, "left": 21}
_FILES = ("data", "camera", "joint_3d", "MANO_NeuralAnnot")


def plan_interhand(request: Request) -> Job:
    """One split: 2D and 3D joints with their validity, intrinsics, MANO if it was fitted. Images are sorted by capture,
    sequence, camera and frame.

    Raises:
        ValueError: the input is not an InterHand2.6M folder, or one of its json files does not parse.
    """
    data, camera, joint, mano = _load(request.input, request.split)
    try:
        image_of = {image["id"]: image for image in data["images"]}
        pairs = [(image_of[note["image_id"]], note) for note in data["annotations"]]
        pairs.sort(key=lambda p: (int(p[0]["capture"]), p[0]["seq_name"], str(p[0]["camera"]), int(p[0]["frame_idx"])))
        work = [_gather(image, note, camera, joint, mano) for image, note in pairs]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"InterHand2.6M_{request.split}_data.json: {error}: not the format of InterHand2.6M v1.0; download it again"
        ) from None
    read = partial(read_hands, request.input / "images" / request.split, request.split)
    without = f"InterHand2.6M_{request.split}_MANO_NeuralAnnot.json is missing: no MANO parameters are written"
    note = () if mano else (f"interhand2.6m: {without}",)
    return Job("interhand2.6m", chunks_of(read, work, request.num_per_shard), TOLERANCE_MM, note=note)


def _load(root: Path, split: str) -> list[dict[str, Any]]:
    """The four json files; the MANO file may be missing."""
    found = []
    for name in _FILES:
        file = f"InterHand2.6M_{split}_{name}.json"
        places = [root / "annotations" / folder / file for folder in (split, "all", ".")]
        path = next((place for place in places if place.is_file()), None)
        if path is None and name != "MANO_NeuralAnnot":
            raise ValueError(
                f"--input {root}: contains no annotations/{split}/{file} (nor annotations/all/{file}); "
                "pass the folder that contains `annotations` and `images` of InterHand2.6M"
            )
        try:
            found.append(json.loads(path.read_bytes()) if path else {})
        except ValueError as error:
            raise ValueError(f"{path}: does not parse ({error}); download it again") from None
    return found


def _gather(image: dict[str, Any], note: dict[str, Any], camera: Any, joint: Any, mano: Any) -> dict[str, Any]:
    """The annotation of one image, so that worker processes do not load all of it. Missing parts are None."""
    capture, frame, cam = str(image["capture"]), str(image["frame_idx"]), str(image["camera"])
    lens = camera.get(capture, {})
    return {
        "file_name": image["file_name"],
        "hand_type": note["hand_type"],
        "joint_valid": note["joint_valid"],
        "camera": {key: lens.get(key, {}).get(cam) for key in ("campos", "camrot", "focal", "princpt")},
        "world": joint.get(capture, {}).get(frame) or {},
        "mano": mano.get(capture, {}).get(frame) or {},
    }


def read_hands(folder: Path, split: str, work: Sequence[dict[str, Any]]) -> Records:
    """The hands of these images, in each the right hand before the left."""
    for entry in work:
        sides = [side for side in _FIRST if entry["hand_type"] in (side, "interacting")]
        if not sides:
            yield SampleError("unknown_hand_type", f"{entry['hand_type']!r} at {entry['file_name']}")
        for side in sides:
            yield attempt(_read_hand, folder, split, entry, side)


def _read_hand(folder: Path, split: str, entry: dict[str, Any], side: str) -> HandRecord:
    order = _FIRST[side] + TO_OPENPOSE
    camera = _camera(entry["camera"])
    joint_cam = (_world_joints(entry["world"].get("world_coord"))[order] - camera["campos"]) @ camera["camrot"].T
    annotated = _valid(entry["joint_valid"])[order] & np.isfinite(joint_cam).all(axis=1)
    visible = annotated
    if (valid_world := entry["world"].get("joint_valid")) is not None:
        annotated = visible & _valid(valid_world)[order]
    if not annotated.any():
        raise SampleError("no_valid_joint")
    image, image_type, size = read_image(folder / entry["file_name"])
    joint_img = project_mm(joint_cam, camera["focal"], camera["princpt"])
    valid = visible_joints(joint_img, size, annotated)
    valid_3d = (annotated & annotated[0]).astype(np.float32)
    withheld = {
        "joints by joint_valid of joint_3d.json": int((visible & ~annotated).sum()),
        "3D joints without a wrist": int((annotated & ~annotated[0]).sum()),
    }
    mano = entry["mano"].get(side)
    pose = turn_root(finite("pose", mano.get("pose"), (48,)), camera["camrot"]) if mano else None
    shape = finite("shape", mano.get("shape"), (10,)) if mano else None
    return HandRecord(
        key=plain_key("interhand", split, entry["file_name"].rpartition(".")[0], side),
        image=image,
        image_type=image_type,
        handedness=side,
        data_source="interhand2.6m",
        **fields_2d(joint_img, valid),
        joint_cam=known_only(joint_cam, valid_3d),
        joint_3d_valid=valid_3d,
        **fields_mano(pose, shape, flat_hand_mean=False),
        focal=camera["focal"],
        princpt=camera["princpt"],
        extra={
            "image_path": f"images/{split}/{entry['file_name']}",
            "source_split": split,
            "additional_desc": entry["hand_type"],
        },
        withheld=withheld,
    )


def _camera(entry: dict[str, Any]) -> dict[str, np.ndarray]:
    shape = {"campos": (3,), "camrot": (3, 3), "focal": (2,), "princpt": (2,)}
    return {key: finite(key, entry[key], shape[key]) for key in shape}


def _valid(value: Any) -> np.ndarray:
    """[42] bool from a joint_valid of [42], [42][1] or [42][3]."""
    width = max(np.size(value) // 42, 1)
    return (finite("joint_valid", value, (42, width)) > 0).all(axis=1)


def _world_joints(value: Any) -> np.ndarray:
    """[42, 3] mm; joints that were not annotated may be anything, including None."""
    if value is None:
        raise SampleError("missing_annotation", "world_coord")
    try:
        return np.array([[np.nan] * 3 if row is None else row for row in value], np.float64).reshape(42, 3)
    except (TypeError, ValueError):
        raise SampleError("wrong_shape", "world_coord is not [42][3]") from None
