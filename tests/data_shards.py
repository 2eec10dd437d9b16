"""Small shards for the data tests: native and labs' format, consistent hands, known pixels."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import webdataset as wds

WIDTH, HEIGHT = 96, 64


def image_of(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """An RGB image unique to this number."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(image: np.ndarray, kind: str) -> bytes:
    ok, data = cv2.imencode(f".{kind}", image[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101] if kind == "webp" else [])
    assert ok
    return data.tobytes()


def hand_arrays(number: int, num_frame: int) -> dict[str, np.ndarray]:
    """Consistent annotations of a clip: joint_img is the projection of joint_cam."""
    rng = np.random.default_rng([7, number])
    focal = np.array([90.0, 95.0]) + rng.uniform(-5, 5, (num_frame, 2))
    princpt = np.array([WIDTH / 2, HEIGHT / 2]) + rng.uniform(-5, 5, (num_frame, 2))
    joint_cam = rng.normal(0, 40, (num_frame, 21, 3)) + np.array([0, 0, 500])
    joint_img = joint_cam[..., :2] / joint_cam[..., 2:] * focal[:, None] + princpt[:, None]
    box = np.concatenate([joint_img.min(axis=1), joint_img.max(axis=1)], axis=-1)
    arrays = {
        "hand_bbox": box,
        "joint_img": joint_img,
        "joint_cam": joint_cam,
        "mano_pose": rng.normal(0, 0.4, (num_frame, 48)),
        "mano_shape": rng.normal(0, 1, (num_frame, 10)),
        "focal": focal,
        "princpt": princpt,
    }
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def native_sample(number: int, num_frame: int = 1, kind: str = "png", **meta: Any) -> dict[str, Any]:
    """A clip in the native format, as webdataset writes it."""
    images = [encode(image_of(100 * number + t), kind) for t in range(num_frame)]
    names = [kind] if num_frame == 1 else [f"{t:04d}.{kind}" for t in range(num_frame)]
    header = {
        "handedness": "right" if number % 2 else "left",
        "data_source": "test",
        "hand_model": "mano",
        "flat_hand_mean": True,
        **meta,
    }
    arrays = {f"{name}.npy": value for name, value in hand_arrays(number, num_frame).items()}
    return {"__key__": f"{number:05d}", "json": header, **dict(zip(names, images)), **arrays}


def lab_sample(number: int, num_frame: int, generation: int) -> dict[str, Any]:
    """A clip in the labs' format: pickled webp images, flags of the first or second generation."""
    images = [encode(image_of(100 * number + t), "webp") for t in range(num_frame)]
    valid = (np.arange(21) % 5 > 0).astype(np.float32) * np.ones((num_frame, 1), np.float32)
    sample = {
        "__key__": f"clip/{number:05d}",
        "imgs_path.json": [f"img/{number}/{t}.webp" for t in range(num_frame)],
        "img_bytes.pickle": pickle.dumps(images),
        "handedness.json": b'"right"' if number % 2 else b'"left"',
        "timestamp.npy": np.arange(num_frame, dtype=np.float64),
        **{f"{name}.npy": value for name, value in hand_arrays(number, num_frame).items()},
        "joint_valid.npy": valid,
        "mano_valid.npy": np.ones(num_frame, bool),
    }
    if generation == 2:
        sample |= {
            "joint_2d_valid.npy": np.ones((num_frame, 21), np.float32),
            "joint_3d_valid.npy": valid,
            "has_mano.npy": np.zeros(num_frame, np.float32),
            "has_intr.npy": np.ones(num_frame, np.float32),
            "data_source.json": b'"lab"',
        }
    return sample


def write_shard(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path), mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def write_tar(path: Path, members: dict[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of raw members, for content that webdataset would not write."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def raw_members(sample: dict[str, Any]) -> dict[str, bytes]:
    """The sample's members as bytes by full name."""
    key = sample["__key__"]
    encoder = wds.writer.make_encoder(True)
    return {f"{key}.{suffix}": data for suffix, data in encoder(sample).items() if suffix != "__key__"}


def data_config(root: Path, train: Any = ("train/*",), val: Any = ("val/*",), **knob: Any) -> SimpleNamespace:
    """The attributes of a Config that the data layer uses."""
    general = {"num_worker": 0, "prefetch_factor": 2, "seed": 3, "val_seed": 42}
    train_section = {
        "sample_per_device": 4,
        "expansion_ratio": 1.5,
        "scale_z_range": [0.9, 1.1],
        "scale_f_range": [0.9, 1.1],
        "persp_rot_max": 8.0,
        "rot_max": 180.0,
        "shift_max": 0.1,
        "brightness": 0.2,
        "contrast": 0.2,
        "saturation": 0.2,
        "noise_std": 3.0,
        "blur_max": 1.0,
        "occlusion_prob": 0.3,
    }
    data = {"root": str(root), "stride": 1, "index_dir": None, "max_bad_fraction": 0.01}
    source = {
        "train": SimpleNamespace(source=_plain(train)),
        "val": SimpleNamespace(source=_plain(val), max_sample=None),
    }
    for section in (general, train_section, data):
        section |= {name: knob.pop(name) for name in list(knob) if name in section}
    source["val"].max_sample = knob.pop("max_sample", None)
    assert not knob, knob
    return SimpleNamespace(
        GENERAL=SimpleNamespace(**general),
        TRAIN=SimpleNamespace(**train_section),
        DATA=SimpleNamespace(**data, **source),
        MODEL=SimpleNamespace(img_size=32),
    )


def _plain(source: Any) -> Any:
    return list(source) if isinstance(source, tuple) else source
