"""The demo's shards: the same bytes for a seed, annotations that agree with the image, readable by webdataset."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds

from src.data.demo import make as demo
from src.data.demo.hand import draw_hands
from src.data.rng import stream
from src.hand.mano import ManoLayer
from src.hand.skeleton import HandArrays
from src.hand.standin.build import build_standin_hand
from src.utils.mesh_render import render_mesh

SIZE = 128
NUM = {"train": 24, "val": 6}


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "SAMPLE_PER_SHARD", 16)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo.make_demo_shards(folder, NUM, seed=3, img_size=SIZE, num_process=1)
    return folder


@pytest.fixture(scope="module")
def samples(root: Path) -> list[dict]:
    urls = [str(p) for p in sorted(root.glob("*/*.tar"))]
    return list(wds.WebDataset(urls, shardshuffle=False).decode("rgb"))


@pytest.fixture(scope="module")
def hand() -> HandArrays:
    return build_standin_hand()


def digest(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha1(p.read_bytes()).hexdigest() for p in sorted(root.glob("*/*"))}


def test_one_subset_only(root: Path, tmp_path: Path) -> None:
    """An evaluation renders the validation images without the training set, which may follow later."""
    demo.make_demo_shards(tmp_path, NUM, 3, SIZE, num_process=1, subsets=("val",))
    assert sorted(p.parent.name for p in tmp_path.glob("*/*.tar")) == ["val"]
    demo.make_demo_shards(tmp_path, NUM, 3, SIZE, num_process=1)
    assert digest(tmp_path) == digest(root)
    done: list[tuple[int, int]] = []
    demo.make_demo_shards(tmp_path, NUM, 3, SIZE, progress=lambda *counts: done.append(counts))
    assert not done, "complete"


def test_views_resemble_photographs() -> None:
    """Palms and backs equally often, upright more often than by chance, open hands and fists."""
    rngs = [stream("views", 0, i) for i in range(2000)]
    draw = draw_hands(rngs, SIZE, free_rotation=0.0)
    palm = -draw.root_rot[:, 2, 1]  # towards the camera: -1 is the palm, 1 the back of the hand
    assert 0.3 < (palm < -0.5).mean() < 0.5
    assert 0.3 < (palm > 0.5).mean() < 0.5
    fingers_up = draw.root_rot[:, 1, 0]  # the fingers point along -x of the hand, y is down
    assert (fingers_up > 0.7).mean() > 0.4
    assert (fingers_up < -0.7).mean() > 0.08
    assert (np.abs(draw.root_rot[:, 2, 0]) > 0.6).mean() > 0.1, "some reach towards the camera or away from it"
    closed = np.linalg.norm(draw.joint[:, 12] - draw.joint[:, 0], axis=1) / np.linalg.norm(
        draw.joint[:, 9] - draw.joint[:, 0], axis=1
    )  # middle fingertip and knuckle from the wrist
    assert (closed < 1.2).mean() > 0.15, "fists"
    assert (closed > 1.8).mean() > 0.3, "straight fingers"


def test_bytes_depend_only_on_the_seed(root: Path, tmp_path: Path) -> None:
    seen = []
    demo.make_demo_shards(tmp_path / "two", NUM, 3, SIZE, num_process=2, progress=lambda *done: seen.append(done))
    assert digest(tmp_path / "two") == digest(root)
    assert sorted(digest(root)) == ["train/000000.tar", "train/000001.tar", "val/000000.tar"]
    assert seen[-1] == (30, 30)
    demo.make_demo_shards(tmp_path / "other", {"val": 6}, 4, SIZE, num_process=1)
    assert digest(tmp_path / "other")["val/000000.tar"] != digest(root)["val/000000.tar"]


def test_resumes_and_then_does_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(root)
    (root / "train/000001.tar").unlink()
    manifest = root / demo.MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": ["val"]}, indent=1) + "\n")
    made = []
    write = demo._write_shard
    monkeypatch.setattr(demo, "_write_shard", lambda path, *more: made.append(path.name) or write(path, *more))
    demo.make_demo_shards(root, NUM, 3, SIZE, num_process=1)
    demo.make_demo_shards(root, NUM, 3, SIZE, num_process=1)
    assert made == ["000001.tar"]
    assert digest(root) == before


def test_other_parameters_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"seed=3, but the request is seed=4.*delete the folder"):
        demo.make_demo_shards(root, NUM, seed=4, img_size=SIZE)
    with pytest.raises(ValueError, match="num_sample"):
        demo.make_demo_shards(root, {"train": 25, "val": 6}, seed=3, img_size=SIZE)
    with pytest.raises(ValueError, match="img_size=9"):
        demo.make_demo_shards(root / "new", NUM, seed=3, img_size=9)
    assert not (root / "new").exists()


def test_other_shards_are_not_mixed_with_the_demo(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.tar").touch()
    with pytest.raises(ValueError, match=r"not the demo's .*mine\.tar.*DATA\.demo=null"):
        demo.make_demo_shards(tmp_path, {"train": 4, "val": 4}, seed=0)
    assert [path.name for path in tmp_path.rglob("*")] == ["train", "mine.tar"]


def test_members(samples: list[dict]) -> None:
    assert len({s["__key__"] for s in samples}) == 30
    shapes = {"hand_bbox": (1, 4), "joint_img": (1, 21, 2), "joint_cam": (1, 21, 3), "mano_pose": (1, 48)}
    shapes |= {"mano_shape": (1, 10), "focal": (1, 2), "princpt": (1, 2)}
    shapes |= {"joint_2d_valid": (1, 21), "joint_3d_valid": (1, 21)}
    for sample in samples:
        assert sample["jpg"].shape == (SIZE, SIZE, 3)
        for name, shape in shapes.items():
            value = sample[f"{name}.npy"]
            assert (value.shape, value.dtype) == (shape, np.float32)
            assert np.isfinite(value).all()
        assert sample["json"]["hand_model"] == "standin"
        assert sample["json"]["flat_hand_mean"] is True
    assert {s["json"]["handedness"] for s in samples} == {"left", "right"}


def test_annotations_agree_for_both_sides(samples: list[dict], hand: HandArrays) -> None:
    layer = ManoLayer(hand)
    for sample in samples:
        flip = np.array([1.0 if sample["json"]["handedness"] == "right" else -1.0, 1.0, 1.0], np.float32)
        cam = sample["joint_cam.npy"][0]
        pose = sample["mano_pose.npy"].reshape(1, 16, 3) * np.array([1.0, flip[0], flip[0]], np.float32)
        rotmat = layer.pose_to_rotmat(torch.from_numpy(pose.reshape(1, 48)), True)
        out = layer(rotmat, torch.from_numpy(sample["mano_shape.npy"]))
        np.testing.assert_allclose(out.joint[0].numpy() * flip + cam[0], cam, atol=0.05)

        focal, princpt = sample["focal.npy"][0], sample["princpt.npy"][0]
        np.testing.assert_allclose(cam[:, :2] / cam[:, 2:] * focal + princpt, sample["joint_img.npy"][0], atol=0.05)
        pixel = sample["joint_img.npy"][0]
        box = np.concatenate([pixel.min(0), pixel.max(0)])
        np.testing.assert_allclose(sample["hand_bbox.npy"][0], box, atol=0.05)
        vert = out.vert[0].numpy() * flip + cam[0]
        point = np.concatenate([vert[:, :2] / vert[:, 2:] * focal + princpt, pixel])
        extent = np.clip(np.concatenate([point.min(0), point.max(0)]), 0, SIZE - 1)
        assert (extent[2:] - extent[:2]).max() > 0.2 * SIZE
        inside = (point > -0.5) & (point < SIZE - 0.5)
        assert inside.all(1).mean() > 0.8
        assert 200 < cam[:, 2].min() < 1100


def test_draws_do_not_depend_on_their_neighbours() -> None:
    def draw(*index: int) -> np.ndarray:
        return draw_hands([stream("demo test", 0, i) for i in index], SIZE, 0.2).joint[-1]

    np.testing.assert_allclose(draw(5), draw(1, 2, 5), atol=1e-3)
    assert np.abs(draw(5) - draw(6)).max() > 1.0


def test_renderer_keeps_the_nearest_surface_and_true_edges() -> None:
    point = np.array([[2, 2], [2, 10], [10, 2], [0, 0], [0, 15], [15, 0]], float)
    depth = np.array([5.0, 5, 5, 9, 9, 9])
    colour = np.array([[255, 0, 0]] * 3 + [[0, 255, 0]] * 3, float)
    image = render_mesh(point, depth, np.array([[0, 1, 2], [3, 4, 5]]), colour, (16, 16))
    y, x = np.mgrid[:16, :16]
    near = (x >= 2) & (y >= 2) & (x + y <= 12)
    far = (x + y <= 15) & ~near
    np.testing.assert_array_equal(image[near], np.broadcast_to([255, 0, 0, 255], (near.sum(), 4)))
    np.testing.assert_array_equal(image[far], np.broadcast_to([0, 255, 0, 255], (far.sum(), 4)))
    assert not image[x + y > 15].any()
    assert not render_mesh(point, depth, np.array([[0, 2, 1]]), colour, (16, 16)).any()  # seen from behind
