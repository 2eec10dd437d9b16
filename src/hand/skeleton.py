"""The hand skeleton: joint names and orders, parents, bones, fingers, and the arrays that define a MANO-like hand.

Numpy only, no torch: data workers and drawing code import it.

Shape legend: V vertices, F faces, J = 21 joints (OpenPose order), K = 16 MANO joints.

There are two joint orders:
  * *MANO order* (16): wrist, then index, middle, pinky, ring, thumb, three joints each, palm to tip.
  * *OpenPose order* (21), used by every Sample, Batch and Prediction: wrist, then thumb, index, middle, ring, pinky,
    four joints each, palm to tip. The fourth of each, the fingertip, is a vertex of the mesh.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FINGER_NAMES = ("thumb", "index", "middle", "ring", "pinky")

# MANO: Romero, Tzionas, Black, "Embodied Hands", SIGGRAPH Asia 2017; the order is that of the official file.
NUM_MANO_JOINT = 16
NUM_MANO_VERTEX = 778
MANO_JOINT_NAMES = ("wrist", *(f"{f}{i}" for f in ("index", "middle", "pinky", "ring", "thumb") for i in (1, 2, 3)))
MANO_PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
MANO_TIP_VERTEX_IDS = (744, 320, 443, 554, 671)  # thumb, index, middle, ring, pinky

JOINT_NAMES = ("wrist", *(f"{f}{i}" for f in FINGER_NAMES for i in (1, 2, 3, 4)))
WRIST = 0
# Index of each finger's four joints in OpenPose order, palm to tip.
FINGER_JOINTS = {f: tuple(range(1 + 4 * i, 5 + 4 * i)) for i, f in enumerate(FINGER_NAMES)}
MIDDLE_KNUCKLE = FINGER_JOINTS["middle"][0]
TIP_JOINTS = tuple(joints[-1] for joints in FINGER_JOINTS.values())
JOINT_PARENTS = tuple(-1 if j == 0 else (0 if j % 4 == 1 else j - 1) for j in range(21))
# (parent, child) pairs for drawing and bone lengths.
BONES = tuple((parent, child) for child, parent in enumerate(JOINT_PARENTS) if parent >= 0)

# joint_21 = concatenate(mano_joint_16, tip_5 in thumb..pinky order)[MANO_TO_OPENPOSE]
MANO_TO_OPENPOSE = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)

NUM_SHAPE = 10
NUM_FINGER_POSE = 45
NUM_POSE_BASIS = 135  # 15 joints x 9 entries of (R - I)


@dataclass(frozen=True, eq=False)
class HandArrays:
    """The arrays of a hand in MANO's parameter space. Lengths are in METRES (MANO's own unit), angles in radians.

    Raises ValueError if shapes, types or values are inconsistent.
    """

    name: str  # "mano" or "standin"
    v_template: np.ndarray  # [V, 3] m
    shapedirs: np.ndarray  # [V, 3, 10] m per unit of shape
    posedirs: np.ndarray  # [V, 3, 135] m per unit of (R - I), joint-major, each 3x3 row-major
    joint_regressor: np.ndarray  # [16, V] rows sum to about 1
    skin_weights: np.ndarray  # [V, 16] rows sum to 1
    faces: np.ndarray  # [F, 3] int, vertex ids
    mean_pose: np.ndarray  # [45] axis-angle added to the fingers if flat_hand_mean is False (MANO's hands_mean)
    tip_vertex_ids: tuple[int, ...]  # thumb, index, middle, ring, pinky

    def __post_init__(self) -> None:
        num = self.num_vertex
        self._check_float("v_template", (num, 3))
        self._check_float("shapedirs", (num, 3, NUM_SHAPE))
        self._check_float("posedirs", (num, 3, NUM_POSE_BASIS))
        self._check_float("joint_regressor", (NUM_MANO_JOINT, num))
        self._check_float("skin_weights", (num, NUM_MANO_JOINT))
        self._check_float("mean_pose", (NUM_FINGER_POSE,))
        self._check_sums("joint_regressor")
        self._check_sums("skin_weights")
        self._check_vertex_ids(num)

    @property
    def num_vertex(self) -> int:
        return self.v_template.shape[0]

    def _check_float(self, key: str, shape: tuple[int, ...]) -> None:
        value = np.asarray(getattr(self, key))
        if value.shape != shape:
            raise ValueError(f"hand '{self.name}': {key} must have shape {shape}, got {value.shape}")
        if value.dtype.kind != "f":
            raise ValueError(f"hand '{self.name}': {key} must be a float array, got dtype {value.dtype}")
        if not np.isfinite(value).all():
            raise ValueError(f"hand '{self.name}': {key} contains NaN or infinite values")

    def _check_sums(self, key: str) -> None:
        worst = float(np.abs(getattr(self, key).sum(axis=1) - 1.0).max())
        if worst > 0.05:  # the published regressors sum to 1 only approximately (a soft term of their fit)
            raise ValueError(f"hand '{self.name}': each row of {key} must sum to 1, one is off by {worst:.3g}")

    def _check_vertex_ids(self, num: int) -> None:
        faces = np.asarray(self.faces)
        if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu":
            raise ValueError(
                f"hand '{self.name}': faces must be [F, 3] integers, got shape {faces.shape} of {faces.dtype}"
            )
        if faces.size and (faces.min() < 0 or faces.max() >= num):
            raise ValueError(f"hand '{self.name}': faces refer to vertices outside 0..{num - 1}")
        tips = tuple(self.tip_vertex_ids)
        if len(tips) != len(FINGER_NAMES) or not all(0 <= t < num for t in tips):
            raise ValueError(f"hand '{self.name}': tip_vertex_ids must be 5 ids within 0..{num - 1}, got {tips}")
