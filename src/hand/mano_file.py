"""Reads MANO's file: the official MANO_RIGHT.pkl without chumpy, scipy or any risk, or the same arrays as .npz.

Numpy only. The official file is a Python 2 pickle of a dict: numpy arrays, a chumpy expression for `shapedirs`
(`chumpy.reordering.Select` over a `chumpy.ch.Ch`), a scipy csc matrix for `J_regressor`, and strings. The unpickler
here builds numpy arrays and inert records of the rest; every other global in the pickle is refused by its name.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from src.hand.skeleton import (
    MANO_JOINT_NAMES,
    MANO_PARENTS,
    MANO_TIP_VERTEX_IDS,
    NUM_FINGER_POSE,
    NUM_MANO_VERTEX,
    NUM_SHAPE,
    HandArrays,
)

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
_GET_IT = (
    "Register at https://mano.is.tue.mpg.de, accept its licence, download 'Models & Code' and put MANO_RIGHT.pkl at "
    "model/mano/MANO_RIGHT.pkl. `MODEL.hand_model=standin` needs no file."
)


class _Record:
    """What stands in for an object of a class we do not have: it keeps the pickled state and does nothing."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"the state of a {type(self).__name__} must be a dict")
        self.state = state


class _Ch(_Record):
    """chumpy.ch.Ch: a plain array under the key 'x'."""


class _Select(_Record):
    """chumpy.reordering.Select: a.ravel()[idxs], reshaped to preferred_shape."""


class _Reshape(_Record):
    """chumpy.reordering.Reshape: a.reshape(newshape)."""


class _Csc(_Record):
    """scipy.sparse.csc_matrix: data and row indices, column after column."""


class _Csr(_Record):
    """scipy.sparse.csr_matrix: data and column indices, row after row."""


def _reconstruct_record(cls: type, base: type, state: None) -> _Record:
    """copy_reg._reconstructor, which protocols 0 and 1 use, for our records alone."""
    if not (isinstance(cls, type) and issubclass(cls, _Record)) or base is not object or state is not None:
        raise pickle.UnpicklingError("copy_reg._reconstructor is allowed for chumpy and scipy objects only")
    return cls.__new__(cls)


def _reconstruct_array(subtype: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """numpy's `_reconstruct`: an empty array whose content follows as its state."""
    if subtype is not np.ndarray:
        raise pickle.UnpicklingError("only plain numpy arrays are allowed in a MANO file")
    return np.ndarray.__new__(subtype, shape, dtype)


def _array_from_buffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """numpy's `_frombuffer`, which protocol 5 uses."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def _scalar(dtype: np.dtype, value: bytes | str) -> Any:
    """numpy's `scalar`."""
    raw = value.encode("latin1") if isinstance(value, str) else value
    return np.frombuffer(raw, dtype=dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    """_codecs.encode, by which Python 3 writes bytes at protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode to {encoding!r} is not allowed in a MANO file")
    return text.encode("latin1")


def _allowed_globals() -> dict[tuple[str, str], Any]:
    """(module, name) as the pickle writes them -> what is used instead."""
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("chumpy.ch", "Ch"): _Ch,
        ("chumpy", "Ch"): _Ch,
        ("chumpy.reordering", "Select"): _Select,
        ("chumpy.reordering", "Reshape"): _Reshape,
        ("_codecs", "encode"): _encode,
    }
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray", "_reconstruct"] = _reconstruct_array
        allowed[f"{core}.multiarray", "scalar"] = _scalar
        allowed[f"{core}.numeric", "_frombuffer"] = _array_from_buffer
    for kind, record in (("csc", _Csc), ("csr", _Csr)):
        for module in ("scipy.sparse", f"scipy.sparse.{kind}", f"scipy.sparse._{kind}"):
            allowed[module, f"{kind}_matrix"] = record
    for builtin in ("__builtin__", "builtins"):
        allowed[builtin, "set"] = set
        allowed[builtin, "object"] = object
    for copyreg in ("copy_reg", "copyreg"):
        allowed[copyreg, "_reconstructor"] = _reconstruct_record
    return allowed


class _ManoUnpickler(pickle.Unpickler):
    """An unpickler that knows the globals of a MANO file and no others."""

    _allowed = _allowed_globals()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a MANO file") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("persistent objects are not allowed in a MANO file")


def _to_array(value: Any) -> np.ndarray:
    """The dense array that a value of the file stands for."""
    if isinstance(value, _Ch):
        return _to_array(value.state["x"])
    if isinstance(value, _Select):
        selected = _to_array(value.state["a"]).ravel()[np.asarray(value.state["idxs"])]
        return selected.reshape(value.state.get("preferred_shape", selected.shape))
    if isinstance(value, _Reshape):
        return _to_array(value.state["a"]).reshape(value.state["newshape"])
    if isinstance(value, (_Csc, _Csr)):
        return _densify(value)
    return np.asarray(value)


def _densify(sparse: _Csc | _Csr) -> np.ndarray:
    """The dense form of a compressed sparse matrix; entries given twice are added, as scipy does."""
    state = sparse.state
    shape = tuple(state["_shape"] if "_shape" in state else state["shape"])
    major = np.repeat(np.arange(len(state["indptr"]) - 1), np.diff(state["indptr"]))
    index = (state["indices"], major) if isinstance(sparse, _Csc) else (major, state["indices"])
    dense = np.zeros(shape)
    np.add.at(dense, index, state["data"])
    return dense


def _read_pickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content = _ManoUnpickler(file, encoding="latin1").load()
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__} where MANO's file holds a dict")
    return content


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def load_hand_arrays(path: str | Path) -> HandArrays:
    """The right MANO hand from the official .pkl, or from an .npz with the same keys (`v_template`, `shapedirs`,
    `posedirs`, `J_regressor`, `weights`, `f`, `hands_mean`; `kintree_table` optional).

    Raises ValueError when the file is missing, holds anything but MANO's arrays, or is the left hand.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"MODEL.hand_model: {path} does not exist. {_GET_IT}")
    if "LEFT" in path.name.upper():
        _refuse_left(path)
    try:
        content = _read_npz(path) if path.suffix == ".npz" else _read_pickle(path)
        missing = sorted(set(_KEYS) - set(content))
        if missing:
            raise ValueError(f"keys missing: {', '.join(missing)}")
        value = {field: _to_array(content[key]) for key, field in _KEYS.items()}
        tree = _to_array(content["kintree_table"]) if "kintree_table" in content else None
        arrays = _build(value, tree)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is not a MANO file that can be read: {error}. {_GET_IT}") from error
    if _is_left(arrays):
        _refuse_left(path)
    return arrays


def load_pose_components(path: str | Path) -> np.ndarray:
    """MANO's full pose basis [45, 45] (`hands_components`) from the file of either hand: axis-angle of the 15 finger
    joints = coefficients @ components, the mean pose not included.

    Raises ValueError when the file is missing or holds no such basis.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist. {_GET_IT}")
    try:
        content = _read_npz(path) if path.suffix == ".npz" else _read_pickle(path)
        components = np.asarray(_to_array(content["hands_components"]), np.float64)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: hands_components cannot be read: {error!r}. {_GET_IT}") from error
    if components.shape != (NUM_FINGER_POSE, NUM_FINGER_POSE):
        raise ValueError(f"{path}: hands_components must be [45, 45], got shape {components.shape}. {_GET_IT}")
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
    return HandArrays(
        name="mano", faces=faces.astype(np.int64), parents=MANO_PARENTS, tip_vertex_ids=MANO_TIP_VERTEX_IDS, **value
    )


def _is_left(arrays: HandArrays) -> bool:
    """Which side the hand is, from anatomy: the mean pose flexes the fingers towards the palm, and on a right hand
    (radial direction) x (finger direction) points out of the palm. A hand without a mean pose passes as right."""
    joint = dict(zip(MANO_JOINT_NAMES, arrays.joint_regressor @ arrays.v_template))
    finger = joint["middle1"] - joint["wrist"]
    radial = joint["index1"] - joint["pinky1"]
    flexion_axis = arrays.mean_pose.reshape(15, 3)[:12].sum(axis=0)  # all but the thumb
    palm = np.cross(flexion_axis, finger)
    return float(np.cross(radial, finger) @ palm) < 0


def _refuse_left(path: Path) -> None:
    raise ValueError(
        f"{path} is the left hand. This project mirrors left hands and needs the right one alone: "
        "set MODEL.hand_model=model/mano/MANO_RIGHT.pkl."
    )
