"""Small folders in the official layouts of the public data sets, with a hand whose ground truth is known.

The hand is the stand-in thinned to MANO's 778 vertices and saved as a "MANO" .npz, so that forward kinematics, joints
and parameters agree. Every writer returns the ground truth by sample key. Millimetres, camera frame, OpenPose order.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml

from src.hand.mano import ManoLayer
from src.hand.mano_file import load_hand_arrays
from src.hand.skeleton import MANO_PARENTS, MANO_TIP_VERTEX_IDS, MANO_TO_OPENPOSE, TIP_JOINTS
from src.hand.standin.build import build_standin_hand
from tests.data_shards import encode, image_of

FLIP = np.diag([1.0, -1.0, -1.0])
TO_MANO = np.argsort(MANO_TO_OPENPOSE)  # OpenPose order -> 16 joints and 5 tips


@dataclass
class Truth:
    """The expected output of a converter for one hand; None: unknown."""

    joint_cam: np.ndarray  # [21, 3]
    is_right: bool = True
    focal: np.ndarray | None = None
    princpt: np.ndarray | None = None
    image: bytes = b""
    valid_3d: np.ndarray = field(default_factory=lambda: np.ones(21))
    annotated: np.ndarray = field(default_factory=lambda: np.ones(21))
    has_mano: bool = True


@lru_cache(maxsize=1)
def hand_content() -> dict[str, np.ndarray]:
    """The arrays of a MANO file: the stand-in hand with 778 of its vertices, the tips at MANO's indices."""
    hand = build_standin_hand()
    needed = set(np.flatnonzero(hand.joint_regressor.any(axis=0)).tolist()) - set(hand.tip_vertex_ids)
    others = sorted(set(range(hand.num_vertex)) - needed - set(hand.tip_vertex_ids))
    body = sorted(needed) + others[: 773 - len(needed)]
    order = np.empty(778, int)
    order[list(MANO_TIP_VERTEX_IDS)] = hand.tip_vertex_ids
    order[np.setdiff1d(np.arange(778), MANO_TIP_VERTEX_IDS)] = body
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(45, 45)))
    return {
        "v_template": hand.v_template[order],
        "shapedirs": hand.shapedirs[order],
        "posedirs": hand.posedirs[order],
        "J_regressor": hand.joint_regressor[:, order],
        "weights": hand.skin_weights[order],
        "f": np.array([[0, 1, 2]]),
        "hands_mean": hand.mean_pose,
        "hands_components": basis,
        "kintree_table": np.array([[0, *MANO_PARENTS[1:]], list(range(16))]),
    }


def write_mano(path: Path) -> Path:
    """Write the hand as a file for --mano."""
    np.savez(path, **hand_content())
    return path


@lru_cache(maxsize=1)
def layer(path: Path) -> ManoLayer:
    return ManoLayer(load_hand_arrays(path)).eval()


def fk(
    mano: Path, pose: np.ndarray, shape: np.ndarray, is_right: bool, flat: bool, mesh_joints: bool = False
) -> np.ndarray:
    """[21, 3] mm about the wrist; a left hand is the mirror image, its axis-angle y and z negated.

    With `mesh_joints` as FreiHAND defines its joints: the regressor applied to the posed vertices.
    """
    pose = np.array(pose, np.float32)
    if not is_right:
        pose = (pose.reshape(16, 3) * np.float32([1, -1, -1])).reshape(48)
    hand = layer(mano)
    with torch.inference_mode():
        rotmat = hand.pose_to_rotmat(torch.from_numpy(pose)[None], flat)
        posed = hand(rotmat, torch.from_numpy(np.float32(shape))[None])
    joint = posed.joint[0].double().numpy()
    if mesh_joints:
        regressed = hand_content()["J_regressor"] @ posed.vert[0].double().numpy()
        joint = np.concatenate([regressed, joint[list(TIP_JOINTS)]])[list(MANO_TO_OPENPOSE)]
    return joint if is_right else joint * [-1, 1, 1]


def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
    """(pose [48], shape [10]) of a random hand."""
    rng = np.random.default_rng([11, number])
    pose = np.concatenate([rng.normal(0, 0.8, 3), rng.normal(0, 0.25, 45)])
    return pose.astype(np.float32).astype(np.float64), np.float64(np.float32(rng.normal(0, 0.8, 10)))


def encoded_image(number: int, size: tuple[int, int], kind: str = "jpg") -> bytes:
    return encode(image_of(number, *size), kind)


def put(path: Path, data: bytes) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def write_freihand(
    root: Path, mano: Path, num: int = 5, flat: bool = False, split: str = "training", mesh_joints: bool = False
) -> dict[str, Truth]:
    """`num` hands, in the training split with four backgrounds each; the evaluation split as released later."""
    lists: dict[str, list[Any]] = {"K": [], "xyz": [], "mano": [], "scale": [], "verts": []}
    truth = {}
    for i in range(num):
        pose, shape = draw(i)
        focal, princpt = np.array([480.0 + i, 470.0]), np.array([112.0, 111.0])
        joint = fk(mano, pose, shape, True, flat, mesh_joints) + np.array([10.0 * i - 20, 5.0, 700.0])
        lists["K"].append([[focal[0], 0, princpt[0]], [0, focal[1], princpt[1]], [0, 0, 1]])
        lists["xyz"].append((joint / 1000).tolist())
        lists["mano"].append([[*pose, *shape, 100.0, 100.0, 0.9]])
        lists["scale"].append(0.025)
        lists["verts"].append([[0.0, 0.0, 0.7]] * 778)
        for version in range(4 if split == "training" else 1):
            number = version * num + i
            image = put(root / split / "rgb" / f"{number:08d}.jpg", encoded_image(number, (224, 224)))
            truth[f"freihand_{split}_{number:08d}"] = Truth(joint, True, focal, princpt, image)
    for name, values in lists.items():
        (root / f"{split}_{name}.json").write_text(json.dumps(values))
    return truth


def _camera(number: int) -> tuple[np.ndarray, np.ndarray]:
    """(camrot [3, 3], campos [3] mm) of a camera that sees the origin from about 1 m."""
    rotation = cv2.Rodrigues(np.random.default_rng([12, number]).normal(0, 0.7, 3))[0]
    return rotation, -rotation.T @ np.array([10.0, -20.0, 1000.0])


def write_interhand(root: Path, mano: Path, split: str = "val") -> dict[str, Truth]:
    """Two frames from two cameras: both hands, then only a left hand; some joints and one wrist not annotated, some of
    them in only one of the two files that have a joint_valid."""
    size, capture, sequence, cameras = (512, 334), 0, "0390_dh_touchROM", ("400262", "400263")
    camera: dict[str, dict[str, Any]] = {"campos": {}, "camrot": {}, "focal": {}, "princpt": {}}
    joints, manos, truth = {}, {}, {}
    data: dict[str, list[Any]] = {"images": [], "annotations": []}
    for number, name in enumerate(cameras):
        rotation, position = _camera(number)
        values = ("campos", position), ("camrot", rotation), ("focal", (1270.0, 1265.0)), ("princpt", (250.0, 170.0))
        for key, value in values:
            camera[key][name] = np.asarray(value).tolist()
    order = np.array([20, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 19, 18, 17, 16])
    for frame, kind in ((2017, "interacting"), (2020, "left")):
        world, valid = np.zeros((42, 3)), np.zeros(42)
        manos[str(frame)] = {"right": None, "left": None}
        for side, first in (("right", 0), ("left", 21)):
            if kind not in (side, "interacting"):
                continue
            pose, shape = draw(frame + first)
            trans = np.array([40.0 if first else -40.0, 0.0, 0.0])
            world[first + order] = fk(mano, pose, shape, side == "right", False) + trans
            valid[first + order] = 1
            manos[str(frame)][side] = {"pose": pose.tolist(), "shape": shape.tolist(), "trans": (trans / 1e3).tolist()}
        annotated = valid.copy()  # in joint_3d.json: whether world_coord means anything
        valid[[3, 21]] = 0  # the right thumb's first joint, the left thumb's tip: annotated, but not in these images
        annotated[[5, 33]], world[[5, 33]] = 0, 0.0  # the right index finger, the left ring finger
        if kind == "left":
            valid[41] = annotated[41] = 0  # the wrist
            manos[str(frame)]["left"] = None
        joints[str(frame)] = {"world_coord": world.tolist(), "joint_valid": annotated[:, None].tolist()}
        for number, name in enumerate(cameras):
            file = f"Capture{capture}/{sequence}/cam{name}/image{frame}.jpg"
            image = put(root / "images" / split / file, encoded_image(frame + number, size))
            info = {"capture": capture, "seq_name": sequence, "camera": name, "frame_idx": frame, "subject": 3}
            key = len(data["images"]) + 100
            data["images"].append({"id": key, "file_name": file, "width": size[0], "height": size[1], **info})
            note = {"id": key + 7, "image_id": key, "bbox": [0, 0, 9, 9], "hand_type": kind, "hand_type_valid": 1}
            data["annotations"].append({**note, "joint_valid": valid.tolist()})
            rotation, position = _camera(number)
            for side, first in (("right", 0), ("left", 21)):
                if kind in (side, "interacting"):
                    known = (valid * annotated)[first + order]
                    truth[f"interhand_{split}_{file[:-4].replace('/', '-')}_{side}"] = Truth(
                        (world[first + order] - position) @ rotation.T,
                        side == "right",
                        np.array([1270.0, 1265.0]),
                        np.array([250.0, 170.0]),
                        image,
                        known * known[0],
                        known,
                        manos[str(frame)][side] is not None,
                    )
    data["images"].reverse()  # the official files are not sorted
    folder = root / "annotations" / split
    folder.mkdir(parents=True)
    content = {"data": data, "camera": camera, "joint_3d": joints, "MANO_NeuralAnnot": manos}
    for name, value in content.items():
        value = value if name == "data" else {str(capture): value}
        (folder / f"InterHand2.6M_{split}_{name}.json").write_text(json.dumps(value))
    return truth


def write_dexycb(root: Path, mano: Path, num_frame: int = 3) -> dict[str, Truth]:
    """Two subjects of s1/train, a right and a left sequence; no hand is visible in the last frame of each."""
    components, truth, size = hand_content()["hands_components"], {}, (640, 480)
    mirrored = (components.reshape(45, 15, 3) * [1, -1, -1]).reshape(45, 45)
    serials = ("836212060125", "932122062010")
    for number, serial in enumerate(serials):
        lens = {"fx": 615.0 + number, "fy": 614.0, "ppx": 320.5, "ppy": 239.5}
        _yaml(root / "calibration" / "intrinsics" / f"{serial}_640x480.yml", {"color": lens, "depth": lens})
    for s, (subject, side) in enumerate((("20200709-subject-01", "right"), ("20200813-subject-02", "left"))):
        calibration, _, betas = f"{subject}_{side}", *draw(500 + s)
        _yaml(root / "calibration" / f"mano_{calibration}" / "mano.yml", {"betas": betas.tolist()})
        sequence = root / subject / f"{subject[:8]}_14175{s}"
        meta = {"serials": list(serials), "num_frames": num_frame, "mano_sides": [side], "mano_calib": [calibration]}
        _yaml(sequence / "meta.yml", {**meta, "extrinsics": "x", "ycb_ids": [1], "ycb_grasp_ind": 0})
        for number, serial in enumerate(serials):
            for frame in range(num_frame):
                pose, _ = draw(600 + 10 * s + frame)
                coefficient = pose[3:].copy()
                full = np.concatenate([pose[:3], coefficient @ (components if side == "right" else mirrored)])
                joint = fk(mano, full, betas, side == "right", False) + np.array([30.0, -20.0, 800.0 + number])
                name = f"{frame:06d}"
                image = put(sequence / serial / f"color_{name}.jpg", encoded_image(frame + 20 * s, size))
                hidden = frame == num_frame - 1
                label = {
                    "seg": np.zeros((4, 4), np.uint8),
                    "pose_m": np.zeros((1, 51)) if hidden else np.array([[*pose, 0.1, 0.1, 0.8]]),
                    "joint_3d": np.full((1, 21, 3), -1.0) if hidden else joint[None] / 1000,
                }
                np.savez(
                    sequence / serial / f"labels_{name}.npz", **{k: v.astype(np.float32) for k, v in label.items()}
                )
                if not hidden:
                    focal, princpt = np.array([615.0 + number, 614.0]), np.array([320.5, 239.5])
                    key = f"dexycb_{subject}_{sequence.name}_{serial}_{name}"
                    truth[key] = Truth(joint, side == "right", focal, princpt, image)
    return truth


def _yaml(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))


def write_ho3d(root: Path, mano: Path, num_frame: int = 4, released: bool = False) -> dict[str, Truth]:
    """A training sequence (its last frame without annotation) and an evaluation sequence: only the wrist, and with
    `released` the two files that the authors published after the challenge."""
    truth, names, xyz = {}, {"train": [], "evaluation": []}, []
    focal, princpt = np.array([617.3, 617.1]), np.array([312.4, 241.4])
    lens = np.array([[focal[0], 0, princpt[0]], [0, focal[1], princpt[1]], [0, 0, 1]])
    for split, sequence in (("train", "ABF10"), ("evaluation", "AP11")):
        for frame in range(num_frame):
            pose, shape = draw(800 + frame)
            in_front = np.array([20.0, -15.0, -600.0])  # OpenGL: negative z
            joint = fk(mano, pose, shape, True, True) + in_front
            meta: dict[str, Any] = {"camMat": lens, "objName": "021_bleach_cleanser", "camIDList": ["0", "1"]}
            if split == "train":
                meta |= {"handPose": pose, "handBeta": shape, "handTrans": np.ones(3)}
                meta |= {"handJoints3D": joint[TO_MANO] / 1000}
                if frame == num_frame - 1:
                    meta |= dict.fromkeys(("handPose", "handBeta", "handTrans", "handJoints3D"))
            else:
                meta |= {"handJoints3D": joint[0] / 1000, "handBoundingBox": [200, 150, 400, 320]}
                xyz.append((joint[TO_MANO] / 1000).tolist())
            folder, name = root / split / sequence, f"{frame:04d}"
            put(folder / "meta" / f"{name}.pkl", pickle.dumps(meta, 2 * (frame % 2)))
            image = put(folder / "rgb" / f"{name}.jpg", encoded_image(frame, (640, 480)))
            names[split].append(f"{sequence}/{name}")
            known = np.ones(21) if split == "train" or released else np.eye(21)[0]
            if split == "evaluation" or frame < num_frame - 1:
                key = f"ho3d_{split}_{sequence}_{name}"
                truth[key] = Truth(joint @ FLIP, True, focal, princpt, image, known, known, split == "train")
    for split, lines in names.items():
        (root / f"{split}.txt").write_text("\n".join(reversed(lines)))
    if released:
        (root / "evaluation_xyz.json").write_text(json.dumps(xyz[::-1]))
        (root / "evaluation_verts.json").write_text(json.dumps([[[0.0, 0.0, -0.6]] * 778] * len(xyz)))
    return truth


def hamer_hand(mano: Path, number: int, is_right: bool) -> tuple[dict[str, Any], Truth]:
    """A hand as in HaMeR's data.pyd, and its ground truth: 2D by a camera that the set does not contain."""
    pose, shape = draw(900 + number)
    joint = fk(mano, pose, shape, is_right, True) + np.array([0.0, 0.0, 700.0])
    pixel = joint[:, :2] / joint[:, 2:] * 300 + 100
    confidence = np.full((21, 1), 0.9)
    confidence[number % 21] = 0
    confidence[(number + 5) % 21] = 0.2  # HaMeR suppresses keypoints below 0.3
    hand = {
        "keypoints_2d": np.float32(np.hstack([pixel, confidence])),
        "keypoints_3d": np.float32(np.hstack([joint / 1000, confidence])),
        "center": np.array([100.0, 100.0]),
        "scale": np.array([0.5, 0.5]),
        "hand_pose": np.float32(pose),
        "betas": np.float32(shape),
        "has_hand_pose": np.array(1.0, np.float32),
        "has_betas": np.array(1.0, np.float32),
        "right": np.float32(is_right),
        "personid": 0,
        "extra_info": {"fitting_loss": np.array({"reprojection_loss": 3.5}), "detection_npz_idx": 0},
    }
    known = np.float64(confidence[:, 0] > 0.3)
    return hand, Truth(joint, is_right, valid_3d=known, annotated=known)


def write_hamer(
    root: Path, mano: Path, subsets: tuple[str, ...] = ("freihand-train", "ih26m-train")
) -> dict[str, Truth]:
    """Two tars per set; every second image shows two hands."""
    truth = {}
    for s, subset in enumerate(subsets):
        (root / subset).mkdir(parents=True)
        for number in range(2):
            with tarfile.open(root / subset / f"{number:06d}.tar", "w") as tar:
                for i in range(2):
                    key = f"images/{subset}.{number}{i}".replace(".", "-")
                    image = encoded_image(10 * number + i, (200, 200))
                    pairs = [hamer_hand(mano, 40 * s + 10 * number + 2 * i + j, bool(j == s)) for j in range(1 + i)]
                    add(tar, f"{key}.jpg", image)
                    add(tar, f"{key}.data.pyd", pickle.dumps([hand for hand, _ in pairs], 4))
                    for j, (_, one) in enumerate(pairs):
                        one.image = image
                        truth[f"{subset}_{key.replace('/', '-')}_{j}"] = one
    return truth


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
