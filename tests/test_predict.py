"""Using a trained network: from its checkpoint, on photographs, with boxes, cameras and both hands."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from src.batch import Batch
from src.config import Config
from src.engine.checkpoint import TrainState, save_checkpoint
from src.engine.parts import network_texts, write_config
from src.hand.standin import build_standin_hand
from src.model.net import PoseNet
from tests.helpers import random_batch, small_config


def make_run(folder: Path, *overrides: str, step: int = 7, is_best: bool = False) -> PoseNet:
    """A run folder with one checkpoint of a network with random weights; returns the network, in eval mode."""
    cfg = small_config(*overrides)
    torch.manual_seed(step)
    net = PoseNet(cfg.MODEL, build_standin_hand())
    folder.mkdir(parents=True, exist_ok=True)
    write_config(cfg, folder / "config.yaml")
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


def test_from_checkpoint_is_the_same_network(tmp_path: Path) -> None:
    run, batch = tmp_path / "run", random_batch(2, 56)
    best, newest = make_run(run, step=3, is_best=True), make_run(run, step=9)
    (run / "config.yaml").unlink()  # the checkpoint alone is enough
    assert_same(PoseNet.from_checkpoint(run), newest, batch)
    assert_same(PoseNet.from_checkpoint(run / "checkpoints"), newest, batch)
    for path in (run / "checkpoints" / "best", run / "best", run / "checkpoints" / "checkpoint-3"):
        assert_same(PoseNet.from_checkpoint(path), best, batch)
    net = PoseNet.from_checkpoint(str(run))
    assert not net.training
    assert net.saved.step == 9
    assert net.saved.expansion_ratio == 1.4


def test_needs_no_backbone_folder_and_no_optimizer(tmp_path: Path) -> None:
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14, "image_size": 98}
    Dinov2Model(Dinov2Config(**shape, mlp_ratio=2, layer_norm_eps=1e-4)).save_pretrained(tmp_path / "dinov2")
    folder = f"MODEL.backbone.backbone_str={tmp_path}/dinov2"
    net = make_run(tmp_path / "run", "MODEL.backbone.random_init=false", folder)
    shutil.rmtree(tmp_path / "dinov2")
    (tmp_path / "run/checkpoints/checkpoint-7/optimizer.pt").unlink()
    shutil.move(tmp_path / "run/checkpoints/checkpoint-7", tmp_path / "alone")
    assert_same(PoseNet.from_checkpoint(tmp_path / "alone"), net, random_batch(2, 56))


def test_older_checkpoint_takes_the_configuration_of_its_run(tmp_path: Path) -> None:
    net = make_run(tmp_path)
    cfg, checkpoint = small_config(), tmp_path / "checkpoints" / "checkpoint-8"
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    save_checkpoint(tmp_path, model=net, optimizer=optimizer, state=TrainState(step=8))
    assert not (checkpoint / "config.yaml").exists()
    assert_same(PoseNet.from_checkpoint(checkpoint), net, random_batch(2, 56))
    assert cfg.MODEL == PoseNet.from_checkpoint(checkpoint).saved.model
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-8 holds no config\.yaml"):
        PoseNet.from_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "backbone.json", "state.json"])
def test_damaged_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    make_run(tmp_path)
    file = tmp_path / "checkpoints" / "checkpoint-7" / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        PoseNet.from_checkpoint(file.parent)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        PoseNet.from_checkpoint(file.parent)


def test_hand_model_is_asked_for(tmp_path: Path) -> None:
    make_run(tmp_path, "MODEL.hand_model=model/mano/NOT_THERE.pkl")
    with pytest.raises(ValueError, match=r"NOT_THERE\.pkl.*there is no such file"):
        PoseNet.from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"was trained with the hand 'model/mano/NOT_THERE.pkl', and 'standin'"):
        PoseNet.from_checkpoint(tmp_path, hand_model="standin")
    with pytest.raises(ValueError, match="no checkpoint at"):
        PoseNet.from_checkpoint(tmp_path / "nothing")
