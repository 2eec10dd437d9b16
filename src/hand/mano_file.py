"""Reads MANO's file: the official MANO_RIGHT.pkl, without chumpy or scipy and without executing it, or an .npz.

Numpy only. The official file is a Python 2 pickle of a dict: numpy arrays, a chumpy expression for `shapedirs`
(`chumpy.reordering.Select` over a `chumpy.ch.Ch`), a scipy csc matrix for `J_regressor`, and strings. The chumpy and
scipy objects are read as records of their attributes; any other global in the pickle is an error that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from src.hand.load import mano_path
from src.hand.skeleton import (
    MANO_JOINT_NAMES,
    MANO_PARENTS,
    MANO_TIP_VERTEX_IDS,
    NUM_FINGER_POSE,
    NUM_MANO_VERTEX,
    NUM_SHAPE,
    HandArrays,
)
from src.utils.restricted_pickle import PLAIN, Allowed, Name, PickleError, Record, read_pickle

# Key of the official file -> field of HandArrays.
_KEYS = {
    "v_template": "v_template",
    "shapedirs": "shapedirs",
    "posedirs": "posedirs",
    "J_regressor": "joint_regressor",
    "weights": "skin_weights",
    "f": "faces",
    "hands_mean": "mean_pose",
}
_DOWNLOAD_HINT = (
    "Register at https://mano.is.tue.mpg.de, accept its licence, download 'Models & Code' and put MANO_RIGHT.pkl at "
    "model/mano/MANO_RIGHT.pkl. `MODEL.hand_model=standin` needs no file."
)


class _Ch(Record):
    """chumpy.ch.Ch: a plain array under the key 'x'."""


class _Select(Record):
    """chumpy.reordering.Select: a.ravel()[idxs], reshaped to preferred_shape."""


class _Csc(Record):
    """scipy.sparse.csc_matrix: data and row indices, column after column."""


class _Csr(Record):
    """scipy.sparse.csr_matrix: data and column indices, row after row."""


_RECORDS: dict[tuple[str, str], type[Record]] = {
    ("chumpy.ch", "Ch"): _Ch,
    ("chumpy", "Ch"): _Ch,
    ("chumpy.reordering", "Select"): _Select,
    **{(module, "csc_matrix"): _Csc for module in ("scipy.sparse", "scipy.sparse.csc", "scipy.sparse._csc")},
    **{(module, "csr_matrix"): _Csr for module in ("scipy.sparse", "scipy.sparse.csr", "scipy.sparse._csr")},
}


def _reconstruct(cls: Name, base: Name, state: None) -> Record:
    """copy_reg._reconstructor, which protocols 0 and 1 use for objects."""
    if not isinstance(cls, Name) or cls not in _RECORDS or base[1:] != ("object",) or state is not None:
        raise PickleError("unsafe_pickle", "copy_reg._reconstructor is allowed for chumpy and scipy objects only")
    return _RECORDS[cls]()


_ALLOWED: Allowed = {
    **PLAIN,
    **_RECORDS,
    **{(builtins, "object"): None for builtins in ("__builtin__", "builtins")},
    **{(copyreg, "_reconstructor"): _reconstruct for copyreg in ("copy_reg", "copyreg")},
}


def _to_array(value: Any) -> np.ndarray:
    """The dense array that a value of the file describes."""
    if isinstance(value, _Ch):
        return _to_array(value.state["x"])
    if isinstance(value, _Select):
        selected = _to_array(value.state["a"]).ravel()[np.asarray(value.state["idxs"])]
        return selected.reshape(value.state.get("preferred_shape", selected.shape))
    if isinstance(value, (_Csc, _Csr)):
        return _densify(value)
    return np.asarray(value)


def _densify(sparse: _Csc | _Csr) -> np.ndarray:
    """The dense form of a compressed sparse matrix; duplicate entries are added, as in scipy."""
    state = sparse.state
    shape = tuple(state["_shape"] if "_shape" in state else state["shape"])
    major = np.repeat(np.arange(len(state["indptr"]) - 1), np.diff(state["indptr"]))
    index = (state["indices"], major) if isinstance(sparse, _Csc) else (major, state["indices"])
    dense = np.zeros(shape)
    np.add.at(dense, index, state["data"])
    return dense


def _read_file(path: Path) -> dict[str, Any]:
    """The content of a .npz or a pickle, by key; nothing in either is executed."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    content = read_pickle(path.read_bytes(), _ALLOWED)
    if not isinstance(content, dict):
        raise ValueError(f"its content is a {type(content).__name__}, not a dict")
    return content


def _existing(path: str | Path, name: str) -> Path:
    """The file that `path` names, or the file `name` in that folder. Raises ValueError if there is none."""
    file = mano_path(path, name)
    if file.is_dir():
        raise ValueError(f"{path} is a folder without {name}.pkl. {_DOWNLOAD_HINT}")
    if not file.is_file():
        raise ValueError(f"{path} does not exist. {_DOWNLOAD_HINT}")
    return file


def load_hand_arrays(path: str | Path) -> HandArrays:
    """The right MANO hand from the official .pkl, or from an .npz with the same keys (`v_template`, `shapedirs`,
    `posedirs`, `J_regressor`, `weights`, `f`, `hands_mean`; `kintree_table` optional). `path`: the file or its folder.

    Raises ValueError if the file is missing, holds anything but MANO's arrays, or is the left hand.
    """
    path = _existing(path, "MANO_RIGHT")
    if "LEFT" in path.name.upper():
        _refuse_left(path)
    try:
        content = _read_file(path)
        missing = sorted(set(_KEYS) - set(content))
        if missing:
            raise ValueError(f"keys missing: {', '.join(missing)}")
        value = {field: _to_array(content[key]) for key, field in _KEYS.items()}
        tree = _to_array(content["kintree_table"]) if "kintree_table" in content else None
        arrays = _build(value, tree)
    except Exception as error:  # a corrupt file can raise anything
        raise ValueError(f"{path} cannot be read as a MANO file: {error}. {_DOWNLOAD_HINT}") from error
    if _is_left(arrays):
        _refuse_left(path)
    return arrays


def load_pose_components(path: str | Path) -> np.ndarray:
    """MANO's full pose basis [45, 45] (`hands_components`) from the file of either hand: axis-angle of the 15 finger
    joints = coefficients @ components, the mean pose not included.

    Raises ValueError if the file is missing or has no such basis.
    """
    path = _existing(path, "MANO_RIGHT")
    try:
        components = np.asarray(_to_array(_read_file(path)["hands_components"]), np.float64)
    except Exception as error:  # a corrupt file can raise anything
        raise ValueError(f"{path}: hands_components cannot be read: {error!r}. {_DOWNLOAD_HINT}") from error
    if components.shape != (NUM_FINGER_POSE, NUM_FINGER_POSE):
        raise ValueError(f"{path}: hands_components must be [45, 45], got shape {components.shape}. {_DOWNLOAD_HINT}")
    return components


def _build(value: dict[str, np.ndarray], tree: np.ndarray | None) -> HandArrays:
    """HandArrays in float64 and int64 from the file's arrays; HandArrays itself checks their shapes."""
    faces = value.pop("faces")
    if value["v_template"].shape != (NUM_MANO_VERTEX, 3):
        raise ValueError(f"v_template must be [{NUM_MANO_VERTEX}, 3], got shape {value['v_template'].shape}")
    if tree is not None and tuple(int(p) for p in tree[0][1:]) != MANO_PARENTS[1:]:
        raise ValueError(f"kintree_table must name MANO's parents {MANO_PARENTS[1:]}, got {tree[0][1:].tolist()}")
    value = {key: np.ascontiguousarray(array, dtype=np.float64) for key, array in value.items()}
    value["shapedirs"] = value["shapedirs"][..., :NUM_SHAPE]
    value["mean_pose"] = value["mean_pose"].reshape(-1)
    return HandArrays(name="mano", faces=faces.astype(np.int64), tip_vertex_ids=MANO_TIP_VERTEX_IDS, **value)


def _is_left(arrays: HandArrays) -> bool:
    """Whether it is a left hand, from anatomy: the mean pose flexes the fingers towards the palm, and on a right hand
    (radial direction) x (finger direction) points out of the palm. A hand without a mean pose counts as right."""
    joint = dict(zip(MANO_JOINT_NAMES, arrays.joint_regressor @ arrays.v_template))
    finger = joint["middle1"] - joint["wrist"]
    radial = joint["index1"] - joint["pinky1"]
    flexion_axis = arrays.mean_pose.reshape(15, 3)[:12].sum(axis=0)  # without the thumb
    palm = np.cross(flexion_axis, finger)
    return float(np.cross(radial, finger) @ palm) < 0


def _refuse_left(path: Path) -> None:
    raise ValueError(
        f"{path} is the left hand. This project mirrors left hands and needs only the right one: give MANO_RIGHT.pkl "
        "(MODEL.hand_model, --hand_model, --mano)."
    )
