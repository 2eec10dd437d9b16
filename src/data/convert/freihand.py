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

In the evaluation split a missing list means unknown. docs/DATA.md lists what is untested without the download.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from src.data.convert.annotate import MM_PER_M, fields_mano, fields_seen, finite, plain_key, read_image
from src.data.convert.chunk import Job, Request, attempt_each, chunks_of
from src.data.shards.writer import HandRecord

SPLITS = ("training", "evaluation")
VERSIONS = ("gs", "hom", "sample", "auto")
TOLERANCE_MM = 1.0  # the published joints are the model's own


def plan_freihand(request: Request) -> Job:
    """One split, images in order of their numbers: 2D and 3D joints, intrinsics and MANO if the files have them.

    Raises:
        ValueError: the input is not a FreiHAND folder, or its lists differ in length.
    """
    root, split = request.input, request.split
    lists = {name: _load(root / f"{split}_{name}.json") for name in ("K", "xyz", "mano")}
    if lists["K"] is None or not (root / split / "rgb").is_dir():
        raise ValueError(
            f"--input {root}: contains no {split}_K.json beside {split}/rgb; "
            "pass the folder into which FreiHAND_pub_v2 was unpacked"
        )
    num = len(lists["K"])
    for name, values in lists.items():
        if values is not None and len(values) != num:
            raise ValueError(f"{root / f'{split}_{name}.json'}: {len(values)} entries, but {split}_K.json has {num}")
    images = range(num * (len(VERSIONS) if split == "training" else 1))
    work = [(i, i // num, {name: values[i % num] for name, values in lists.items() if values}) for i in images]
    read = partial(attempt_each, partial(_read_hand, root, split))
    return Job("freihand", chunks_of(read, work, request.num_per_shard), TOLERANCE_MM, sides=("right",))


def _load(path: Path) -> list[Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: does not parse ({error}); unpack the archive again") from None
    if not isinstance(values, list):
        raise ValueError(f"{path}: is not a list as in FreiHAND; pass the folder of FreiHAND itself")
    return values


def _read_hand(root: Path, split: str, number: int, version: int, entry: dict[str, Any]) -> HandRecord:
    """The hand of an image on background `version`, with its entries of the json lists."""
    path = Path(split) / "rgb" / f"{number:08d}.jpg"
    image, image_type, size = read_image(root / path)
    camera = finite("K", entry["K"], (3, 3))
    joint_cam = finite("xyz", entry.get("xyz"), (21, 3)) * MM_PER_M
    mano = finite("mano", entry["mano"], (61,)) if "mano" in entry else None
    parameters = {} if mano is None else fields_mano(mano[:48], mano[48:58], flat_hand_mean=False)
    return HandRecord(
        key=plain_key("freihand", split, f"{number:08d}"),
        image=image,
        image_type=image_type,
        handedness="right",
        data_source="freihand",
        **fields_seen(joint_cam, np.diag(camera)[:2], camera[:2, 2], size),
        **parameters,
        extra={"image_path": str(path), "source_split": split, "additional_desc": f"background {VERSIONS[version]}"},
    )
