"""FreiHAND (Zimmermann et al., ICCV 2019) -> native shards. Right hands only, each training hand with four backgrounds.

Official files, as unpacked from FreiHAND_pub_v2 (and _eval):

    training/rgb/%08d.jpg       130,240 images; image i shows hand i % 32,560 on background i // 32,560
    training_K.json             [N][3][3] px                training_xyz.json    [N][21][3] m, camera frame
    training_mano.json          [N][1][61]: pose 48 axis-angle, shape 10, then a root pixel and a scale (unused here)
    evaluation/rgb/%08d.jpg     3,960 images; evaluation_K.json, _xyz.json, _mano.json if released

Read from the official toolbox (github.com/lmb-freiburg/freihand, utils/fh_utils.py, utils/model.py, view_samples.py):
lists of equal length; the versions follow one another (gs, hom, sample, auto); the pose is axis-angle with MANO's mean
pose added (flat_hand_mean=False), root in the camera frame, right hand. Joints are in OpenPose order.
Measured on three real samples: joints project into the image within 0.1 px, and the tips are vertices 744, 333, 444,
555, 672 of the mesh (the toolbox's own table has 320 and 443; this project's MANO layer uses 744, 320, 443, 554, 671,
2 to 4 mm away, so `joint_cam` of the tips differs from FK by that much).

Untested without the download: the real training_mano.json (`--mano` checks its convention), and whether the released
evaluation files have the same form as the training files (a missing list means unknown).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from src.data.convert.annotate import (
    MM_PER_M,
    fields_2d,
    fields_mano,
    finite,
    plain_key,
    project_mm,
    read_image,
    visible_joints,
)
from src.data.convert.chunk import Chunk, ConvertSummary, Job, Progress, Records, Request, Skip
from src.data.convert.job import run
from src.data.shards.errors import SampleError
from src.data.shards.writer import HandRecord

SPLITS = ("training", "evaluation")
VERSIONS = ("gs", "hom", "sample", "auto")
TOLERANCE_MM = 1.0  # the published joints are the model's own


def convert_freihand(request: Request, progress: Progress | None = None) -> ConvertSummary:
    """Convert one split: 2D and 3D joints, intrinsics and MANO if the files have them.

    Raises:
        ValueError: the input is not a FreiHAND folder, or its lists differ in length.
    """
    return run(plan_freihand(request), request, progress)


def plan_freihand(request: Request) -> Job:
    """Split the images, in order of their numbers, into chunks. Raises as `convert_freihand`."""
    root, split = request.input, request.split
    lists = {name: _load(root / f"{split}_{name}.json") for name in ("K", "xyz", "mano")}
    if lists["K"] is None or not (root / split / "rgb").is_dir():
        raise ValueError(
            f"--input {root}: holds no {split}_K.json beside {split}/rgb; "
            "give the folder into which FreiHAND_pub_v2 was unpacked"
        )
    num = len(lists["K"])
    for name, values in lists.items():
        if values is not None and len(values) != num:
            raise ValueError(f"{root / f'{split}_{name}.json'}: {len(values)} entries, but {split}_K.json has {num}")
    count = num * (len(VERSIONS) if split == "training" else 1)
    chunks = []
    for first in range(0, count, request.num_per_shard):
        images = range(first, min(first + request.num_per_shard, count))
        work = [(i, i // num, {name: values[i % num] for name, values in lists.items() if values}) for i in images]
        chunks.append(Chunk(f"{len(chunks):06d}", len(work), read_hands, (root, split, work)))
    return Job("freihand", chunks, TOLERANCE_MM, sides=("right",))


def _load(path: Path) -> list[Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: does not parse ({error}); unpack the archive again") from None
    if not isinstance(values, list):
        raise ValueError(f"{path}: is not a list as in FreiHAND; give the folder of FreiHAND itself")
    return values


def read_hands(root: Path, split: str, work: list[tuple[int, int, dict[str, Any]]]) -> Records:
    """The hands of some images: (image number, background version, its entries of the json lists)."""
    for number, version, entry in work:
        try:
            yield _read_hand(root, split, number, version, entry)
        except SampleError as error:
            yield Skip(error.reason, error.detail)


def _read_hand(root: Path, split: str, number: int, version: int, entry: dict[str, Any]) -> HandRecord:
    path = Path(split) / "rgb" / f"{number:08d}.jpg"
    image, image_type, size = read_image(root / path)
    camera = finite("K", entry["K"], (3, 3))
    focal, princpt = np.diag(camera)[:2], camera[:2, 2]
    joint_cam = finite("xyz", entry.get("xyz"), (21, 3)) * MM_PER_M
    joint_img = project_mm(joint_cam, focal, princpt)
    valid = visible_joints(joint_img, size)
    mano = finite("mano", entry["mano"], (61,)) if "mano" in entry else None
    parameters = {} if mano is None else fields_mano(mano[:48], mano[48:58], flat_hand_mean=False)
    return HandRecord(
        key=plain_key("freihand", split, f"{number:08d}"),
        image=image,
        image_type=image_type,
        handedness="right",
        data_source="freihand",
        **fields_2d(joint_img, valid),
        joint_cam=joint_cam,
        joint_3d_valid=np.ones(21, np.float32),
        **parameters,
        focal=focal,
        princpt=princpt,
        extra={"image_path": str(path), "source_split": split, "additional_desc": f"background {VERSIONS[version]}"},
    )
