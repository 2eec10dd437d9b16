"""FreiHAND (Zimmermann et al., ICCV 2019) -> native shards. Right hands only, each training hand with four backgrounds.

Official files, as unpacked from FreiHAND_pub_v2 (and _eval):

    training/rgb/%08d.jpg       130,240 images; image i shows hand i % 32,560 on background i // 32,560
    training_K.json             [N][3][3] px                training_xyz.json    [N][21][3] m, camera frame
    training_mano.json          [N][1][61]: pose 48 axis-angle, shape 10, then a root pixel and a scale (unused here)
    evaluation/rgb/%08d.jpg     3,960 images; evaluation_K.json, and _xyz.json, _mano.json since their release (2021, in
                                FreiHAND_pub_v2_eval.zip) in the same form; _verts.json and _scale.json are not used

Read from the official toolbox (github.com/lmb-freiburg/freihand, utils/fh_utils.py, utils/model.py, view_samples.py):
lists of equal length; the versions follow one another (gs, hom, sample, auto); the pose is axis-angle with MANO's mean
pose added (flat_hand_mean=False), root in the camera frame, right hand. Joints are in OpenPose order; they are MANO's
joint regressor applied to the posed vertices, not the joints of the kinematic chain. The parameters were converted from
an older MANO, which left 0.6 mm per vertex (README, "Mano version"); hence the tolerance of the MANO check.
Measured on three real samples: joints project into the image within 0.1 px, and the tips are vertices 744, 333, 444,
555, 672 of the mesh (the toolbox's own table has 320 and 443; this project's MANO layer uses 744, 320, 443, 554, 671,
2 to 4 mm away, so `joint_cam` of the tips differs from FK by that much).

Without _mano.json, MANO is unknown. docs/DATA.md lists what is untested without the download.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from src.data.convert.annotate import MM_PER_M, fields_mano, fields_seen, finite, load_list, plain_key, read_image
from src.data.convert.chunk import Job, Request, attempt_each, chunks_of
from src.data.convert.mano_check import OWN_JOINTS_MM
from src.data.shards.writer import HandRecord

SPLITS = ("training", "evaluation")
VERSIONS = ("gs", "hom", "sample", "auto")
_USED, _UNUSED = ("K", "xyz", "mano"), ("verts", "scale", "errors")


def plan_freihand(request: Request) -> Job:
    """One split, images in order of their numbers: 2D and 3D joints, intrinsics and MANO if the files have them.

    Raises:
        ValueError: the input is not a FreiHAND folder, or its lists differ in length.
    """
    root, split = request.input, request.split
    path = {name: root / f"{split}_{name}.json" for name in (*_USED, *_UNUSED)}
    if not path["K"].is_file() or not (root / split / "rgb").is_dir():
        raise ValueError(
            f"--input {root}: contains no {split}_K.json beside {split}/rgb; "
            "pass the folder into which FreiHAND_pub_v2 was unpacked"
        )
    if not path["xyz"].is_file():
        raise ValueError(
            f"{path['xyz']}: missing; the evaluation joints are in FreiHAND_pub_v2_eval.zip of the set's page"
        )
    lists = {name: load_list(path[name]) for name in _USED if path[name].is_file()}
    num = len(lists["K"])
    for name, values in lists.items():
        if len(values) != num:
            raise ValueError(f"{path[name]}: {len(values)} entries, but {split}_K.json has {num}")
    images = range(num * (len(VERSIONS) if split == "training" else 1))
    work = [(i, i // num, {name: values[i % num] for name, values in lists.items()}) for i in images]
    chunks = chunks_of(partial(attempt_each, partial(_read_hand, root, split)), work, request.num_per_shard)
    note = [f"freihand: {path[name].name} is not used" for name in _UNUSED if path[name].is_file()]
    if "mano" not in lists:
        note.append(f"freihand: {path['mano'].name} is missing: no MANO parameters are written")
    return Job("freihand", chunks, OWN_JOINTS_MM, sides=("right",), note=tuple(note))


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
