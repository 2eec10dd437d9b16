"""Loading a trained network from its checkpoint, and predicting on images with boxes, cameras and both hands."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from src.batch import Batch, Sample
from src.checkpoint.folder import write_manifest
from src.checkpoint.network import LoadedNetwork, load_network
from src.checkpoint.run_folder import config_yaml
from src.checkpoint.save import TrainState, network_texts, save_checkpoint
from src.config import Config
from src.data.augment import Augmentation
from src.data.crop import crop_samples
from src.geometry.patch import BORDER, MIRROR
from src.hand.standin.build import build_standin_hand
from src.model.net import PoseNet
from src.predict.predictor import Predictor
from tests.helpers import random_batch, small_config


def make_run(folder: Path, *overrides: str, step: int = 7, is_best: bool = False) -> PoseNet:
    """A run folder with one checkpoint of a network with random weights; returns the network, in eval mode."""
    cfg = small_config(*overrides)
    torch.manual_seed(step)
    net = PoseNet(cfg.MODEL, build_standin_hand())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config_yaml(cfg))
    save(folder, cfg, net, step, is_best)
    return net.eval()


def save(folder: Path, cfg: Config, net: PoseNet, step: int, is_best: bool) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state, texts = TrainState(step=step), network_texts(cfg, net)
    save_checkpoint(folder, model=net, optimizer=optimizer, state=state, texts=texts, is_best=is_best)


def assert_same(first: PoseNet, second: PoseNet, batch: Batch) -> None:
    with torch.no_grad():
        one, two = first(batch), second(batch)
    for f in fields(one):
        assert torch.equal(getattr(one, f.name), getattr(two, f.name)), f.name


def loaded_net(path: Path | str) -> PoseNet:
    return load_network(path).network


def test_the_loaded_network_is_the_saved_one(tmp_path: Path) -> None:
    run, batch = tmp_path / "run", random_batch(2, 56)
    best, newest = make_run(run, step=3, is_best=True), make_run(run, step=9)
    (run / "config.yaml").unlink()  # the checkpoint alone is enough
    assert_same(loaded_net(run), newest, batch)
    assert_same(loaded_net(run / "checkpoints"), newest, batch)
    for path in (run / "checkpoints" / "best", run / "best", run / "checkpoints" / "checkpoint-3"):
        assert_same(loaded_net(path), best, batch)
    loaded = load_network(str(run))
    assert not loaded.network.training
    assert loaded.step == 9
    assert loaded.crop == 1.25
    assert loaded.folder == run / "checkpoints" / "checkpoint-9"


def test_needs_no_backbone_folder_and_no_optimizer(tmp_path: Path) -> None:
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14, "image_size": 98}
    Dinov2Model(Dinov2Config(**shape, mlp_ratio=2, layer_norm_eps=1e-4)).save_pretrained(tmp_path / "dinov2")
    folder = f"MODEL.backbone.backbone_str={tmp_path}/dinov2"
    net = make_run(tmp_path / "run", "MODEL.backbone.random_init=false", folder)
    shutil.rmtree(tmp_path / "dinov2")
    (tmp_path / "run/checkpoints/checkpoint-7/optimizer.pt").unlink()
    shutil.move(tmp_path / "run/checkpoints/checkpoint-7", tmp_path / "alone")
    assert_same(loaded_net(tmp_path / "alone"), net, random_batch(2, 56))


def test_older_checkpoint_uses_the_configuration_of_its_run(tmp_path: Path) -> None:
    net = make_run(tmp_path)
    cfg, checkpoint = small_config(), tmp_path / "checkpoints" / "checkpoint-8"
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    save_checkpoint(tmp_path, model=net, optimizer=optimizer, state=TrainState(step=8))
    assert not (checkpoint / "config.yaml").exists()
    assert_same(loaded_net(checkpoint), net, random_batch(2, 56))
    assert load_network(checkpoint).model_config == cfg.MODEL
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-8 holds no config\.yaml"):
        load_network(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "backbone.json", "state.json"])
def test_corrupt_file_is_named(tmp_path: Path, name: str) -> None:
    make_run(tmp_path)
    file = tmp_path / "checkpoints" / "checkpoint-7" / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is corrupt"):
        load_network(file.parent)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{name} is corrupt"):
        load_network(file.parent)


def test_missing_hand_model_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, "MODEL.hand_model=model/mano/NOT_THERE.pkl")
    with pytest.raises(ValueError, match=r"NOT_THERE\.pkl.*there is no such file"):
        load_network(tmp_path)
    with pytest.raises(ValueError, match=r"with the hand model 'model/mano/NOT_THERE.pkl', but 'standin' was given"):
        load_network(tmp_path, hand_model="standin")
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_network(tmp_path / "nothing")


def test_weights_that_do_not_fit_are_counted_and_a_few_are_named(tmp_path: Path) -> None:
    """Two decoder layers in the file, one in the configuration: the message is a line, whatever the number of names."""
    make_run(run := tmp_path / "run")
    folder = run / "checkpoints" / "checkpoint-7"
    config = folder / "config.yaml"
    before, decoder = config.read_text().split("handec:")
    assert "num_layer: 2" in decoder
    config.write_text(before + "handec:" + decoder.replace("num_layer: 2", "num_layer: 1", 1))
    write_manifest(folder)
    with pytest.raises(ValueError, match=r"does not fit this version of the network: \d+ unexpected") as caught:
        load_network(run)
    message = str(caught.value)
    assert message.count("decoder.layers.1.") == 3
    assert "\n" not in message


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedNetwork:
    """A network whose random weights predict different hands for different images."""
    folder = tmp_path_factory.mktemp("net")
    make_run(folder)
    loaded = load_network(folder)
    with torch.no_grad():
        loaded.network.pose_head.weight.mul_(50)
        loaded.network.root_head.linear.weight.mul_(20)
        loaded.network.shape_head.linear.weight.mul_(100)
    return loaded


@pytest.fixture(scope="module")
def net(loaded: LoadedNetwork) -> PoseNet:
    return loaded.network


@pytest.fixture(scope="module")
def predictor(loaded: LoadedNetwork) -> Predictor:
    return Predictor(loaded)


def photograph(seed: int = 0, height: int = 150, width: int = 201) -> np.ndarray:
    """A smooth random image [height, width, 3] uint8."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


BOX, FOCAL, PRINCPT = np.array([40.0, 30.0, 110.0, 90.0]), np.array([260.0, 240.0]), np.array([107.0, 70.0])


def test_left_is_the_mirror_of_right(predictor: Predictor) -> None:
    image = photograph()
    last = image.shape[1] - 1
    mirrored_box = [last - BOX[2], BOX[1], last - BOX[0], BOX[3]]
    right = predictor.predict([image], [BOX], FOCAL, PRINCPT)
    left = predictor.predict([image[:, ::-1]], [mirrored_box], FOCAL, [last - PRINCPT[0], PRINCPT[1]], is_right=False)
    assert right.is_right.tolist() == [True]
    assert left.is_right.tolist() == [False]
    for name in ("joint_cam", "vert_cam", "root_cam"):
        assert np.allclose(getattr(left, name) * (-1, 1, 1), getattr(right, name), atol=0.02), name
    assert np.allclose(last - left.joint_img[..., 0], right.joint_img[..., 0], atol=0.01)
    assert np.allclose(left.joint_img[..., 1], right.joint_img[..., 1], atol=0.01)
    assert np.allclose(left.mano_shape, right.mano_shape, atol=1e-4)
    signs = np.tile([1, -1, -1], 16)
    assert np.allclose(left.mano_pose * signs, right.mano_pose, atol=1e-4)
    assert np.abs(right.mano_pose[0, :3]).max() > 0.1, "a pose of zero would be its own mirror image"


def test_handedness_changes_the_prediction(predictor: Predictor) -> None:
    right, left = (predictor.predict([photograph()], [BOX], FOCAL, PRINCPT, is_right=side) for side in (True, False))
    assert np.abs(right.joint_cam - left.joint_cam).max() > 5


@pytest.mark.parametrize("is_right", [True, False])
def test_outputs_are_consistent(net: PoseNet, predictor: Predictor, is_right: bool) -> None:
    """Pose, shape and translation give the vertices; the camera gives the pixels; the faces point outward."""
    hands = predictor.predict([photograph()], [BOX], FOCAL, PRINCPT, is_right=is_right)
    mirror, signs = (np.ones(3), np.ones(48)) if is_right else (np.array([-1, 1, 1]), np.tile([1, -1, -1], 16))
    rotmat = net.hand.pose_to_rotmat(torch.from_numpy(hands.mano_pose * signs).float(), True)
    posed = net.hand(rotmat, torch.from_numpy(hands.mano_shape))
    assert np.allclose(posed.vert.numpy() * mirror + hands.root_cam[:, None], hands.vert_cam, atol=1e-2)
    assert np.allclose(posed.joint.numpy() * mirror + hands.root_cam[:, None], hands.joint_cam, atol=1e-2)
    expected = hands.joint_cam[0, :, :2] / hands.joint_cam[0, :, 2:] * FOCAL + PRINCPT
    assert np.allclose(hands.joint_img[0], expected, atol=1e-2)
    corner = hands.vert_cam[0][hands.faces_of(0)]
    volume = np.einsum("fc,fc->f", corner[:, 0], np.cross(corner[:, 1], corner[:, 2])).sum() / 6
    assert volume > 1e4, "a mesh wound inwards has a negative volume"


def test_patches_are_those_of_training(net: PoseNet, predictor: Predictor) -> None:
    """The network gets, to the last bit, the patch that the data layer cuts of the same hand in validation."""
    zero = np.zeros((21, 3))
    for is_right in (True, False):
        sample = Sample(
            *("key", "source", photograph(), is_right, BOX, zero[:, :2], zero[:, 0], zero, zero[:, 0]),
            *(np.zeros(48), np.zeros(10), False, True, FOCAL, PRINCPT, True),
        )
        cropped = crop_samples([sample], [Augmentation()], net.img_size, predictor.loaded.crop)
        batch = cropped.map(torch.from_numpy)
        with torch.no_grad():
            expected = net.predict_patch(batch.patch, batch.patch_focal, batch.patch_princpt)
        hands = predictor.predict([sample.image], [BOX], FOCAL, PRINCPT, is_right=is_right)
        assert np.array_equal(hands.joint_cam * (1 if is_right else MIRROR), expected.joint_cam.numpy())


def test_many_images_many_boxes(net: PoseNet, predictor: Predictor) -> None:
    """Several hands per image, mixed sizes, batches of another size: each hand as if it were alone."""
    images = [photograph(1), photograph(2, 90, 80), photograph(3, 200, 120)]
    boxes = [[BOX, BOX + 20], np.zeros((0, 4)), [10, 20, 60, 90]]
    focal, princpt = np.array([[200, 210], [90, 90], [300, 300]]), np.array([[100, 75], [40, 45], [60, 99]])
    hands = predictor.predict(images, boxes, focal, princpt, is_right=[[True, False], True, False], batch_size=2)
    assert hands.image_index.tolist() == [0, 0, 2]
    assert hands.is_right.tolist() == [True, False, False]
    alone = predictor.predict([images[0]], [BOX + 20], focal[0], princpt[0], is_right=False)
    assert np.allclose(hands.vert_cam[1], alone.vert_cam[0], atol=1e-2)
    last = predictor.predict([images[2]], [boxes[2]], 300, princpt[2], is_right=False)
    assert np.allclose(hands.vert_cam[2], last.vert_cam[0], atol=1e-2)
    assert len(predictor.predict([], [])) == 0
    assert predictor.predict([images[0]], [[]]).vert_cam.shape == (0, net.hand.num_vertex, 3)


def test_boxes_at_the_border(predictor: Predictor) -> None:
    """Beyond the edge a patch is grey; without a box the patch shows the whole image."""
    image = photograph()
    padded = cv2.copyMakeBorder(image, 60, 60, 60, 60, cv2.BORDER_CONSTANT, value=BORDER)
    for box in ([-10.0, -12, 20, 18], [180.0, 128, 210, 158]):  # not shrunk: a filter would mix in the padding's grey
        hands = predictor.predict([image], [box], FOCAL, PRINCPT)
        shifted = predictor.predict([padded], [np.add(box, 60)], FOCAL, PRINCPT + 60)
        assert np.isfinite(hands.vert_cam).all()
        assert np.allclose(hands.joint_cam, shifted.joint_cam, atol=0.5)
    whole, (height, width) = predictor.predict([image]), image.shape[:2]
    assert np.allclose(whole.focal, np.hypot(width, height))
    side = width / predictor.loaded.crop
    assert np.allclose(whole.box[0, 2:] - whole.box[0, :2], side)
    assert np.allclose(whole.box[0, 2:] + whole.box[0, :2], [width - 1, height - 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[300, 10, 340, 60]]}, r"image 0: the box .* is outside the image of 201 x 150 px"),
        ({"boxes": [[90, 10, 30, 60]]}, r"image 0: the box .* x0 < x1"),
        ({"boxes": [BOX, BOX]}, "boxes has 2 entries for 1 images"),
        ({"is_right": [True, True]}, "is_right has 2 entries for 1 images"),
        ({"focal": -3}, "image 0: invalid camera, focal"),
        ({"princpt": 3}, "princpt must be"),
        ({"images": [np.zeros((4, 4))]}, r"image 0 must be a uint8 array \[H, W, 3\] in RGB, not float64 \[4, 4\]"),
    ],
)
def test_invalid_inputs_are_named(predictor: Predictor, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor.predict(**({"images": [photograph()], "boxes": [BOX]} | change))
