"""Write submission files of the FreiHAND and HO-3D challenges: `pred.json`, and `pred.zip` with it inside.

Both contain `[joints, vertices]`: for each evaluation image, in the challenge's order, 21 x 3 and 778 x 3 numbers in
metres, in the camera of the source image. The layout follows the official pred.py and eval.py
(github.com/lmb-freiburg/freihand, github.com/shreyashampali/ho3d):

* FreiHAND: images by number; joints in OpenPose order (wrist, thumb to pinky, palm to tip); camera x right, y down,
  z forward.
* HO-3D: images as in its `evaluation.txt`; joints in MANO's order and then the tips from thumb to pinky; OpenGL's
  camera, y up and z backward, so that y and z change sign.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.hand.skeleton import MANO_TO_OPENPOSE
from src.metric import Samples

_DECIMAL = 6  # micrometres
_TO_OPENGL = np.array([1.0, -1.0, -1.0])
_OPENPOSE_TO_HO3D = np.argsort(MANO_TO_OPENPOSE)


def read_order(path: Path) -> list[str]:
    """Read a challenge's list of image names (`evaluation.txt`), one per line. Raises ValueError."""
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--order {path}: cannot be read ({error}); give the set's evaluation.txt") from error
    if not names or len(set(names)) != len(names):
        raise ValueError(f"--order {path}: must name every image once, one per line")
    return names


def write_submission(challenge: str, samples: Samples, folder: Path, order: Sequence[str] | None = None) -> Path:
    """Write `pred.json` and `pred.zip` into `folder`; returns the zip.

    Args:
        challenge: "freihand" or "ho3d".
        samples: with joint_cam and vert_cam, one hand per image.
        order: image names in the challenge's order, as `SEQUENCE/0000`; None: sorted by key.

    Raises:
        ValueError: an image has more than one hand, or an image of `order` has no prediction.
    """
    rows = _rows(samples.key, order)
    joint, vert = samples.joint_cam[rows] / 1000.0, samples.vert_cam[rows] / 1000.0
    if challenge == "ho3d":
        joint, vert = joint[:, _OPENPOSE_TO_HO3D] * _TO_OPENGL, vert * _TO_OPENGL
    text = json.dumps([joint.round(_DECIMAL).tolist(), vert.round(_DECIMAL).tolist()])
    path = folder / "pred.zip"
    (folder / "pred.json").write_text(text, encoding="utf-8")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "pred.json", "pred.json")
    return path


def _rows(keys: Sequence[str], order: Sequence[str] | None) -> list[int]:
    """The row of each image in the challenge's order. The clip in a key "<clip>/<frame>" ends with the image's name."""
    names = [key.rpartition("/")[0] for key in keys]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} has more than one hand; a challenge allows one per image")
    if order is None:
        return np.argsort(names).tolist()
    wanted = [name.replace("/", "_") for name in order]
    length = len(wanted[0].split("_"))
    found = {"_".join(name.split("_")[-length:]): row for row, name in enumerate(names)}
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"{len(missing)} of the {len(wanted)} images of --order have no prediction, the first is {missing[0]}; "
            f"convert the whole evaluation split and name it in DATA.val.source"
        )
    return [found[name] for name in wanted]
