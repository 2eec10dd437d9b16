"""The shipped networks: model/mini fits its configuration, model/hand-mini predicts rendered hands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from src.data.demo.hand import draw_hands
from src.data.demo.scene import paint
from src.data.rng import stream
from src.hand.standin.build import build_standin_hand
from src.metric import align_procrustes
from src.model.net import PoseNet
from src.predict.predictor import Predictor
from tests.helpers import ROOT, compose_config

MINI, HAND_MINI = ROOT / "model/mini", ROOT / "model/hand-mini"
NUM = 48


def size_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def test_mini_fits_its_configuration() -> None:
    cfg = compose_config("stage1-demo", f"MODEL.backbone.backbone_str={MINI}")
    backbone = PoseNet(cfg.MODEL, build_standin_hand()).backbone
    shape = json.loads((MINI / "config.json").read_text())
    own = cfg.MODEL.backbone
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"], shape["patch_size"]) == (
        own.hidden_size,
        own.num_layer,
        own.num_head,
        own.patch_size,
    )
    assert shape["image_size"] == cfg.MODEL.img_size
    patch = torch.rand(2, 3, cfg.MODEL.img_size, cfg.MODEL.img_size, generator=torch.Generator().manual_seed(0))
    token = backbone(patch)
    assert torch.isfinite(token).all()
    assert (token[0] - token[1]).abs().mean() > 0.01
    assert size_mb(MINI) <= 12


def test_hand_mini_predicts_rendered_hands() -> None:
    """On a seed that it was not trained on: far better than a constant pose in 2D, orientation and fingers."""
    rngs = [stream("shipped", 0, i) for i in range(NUM)]
    draw = draw_hands(rngs, 160, free_rotation=0.0)
    images = paint(draw, rngs, 160)
    predictor = Predictor.load(HAND_MINI)
    pixel = draw.joint[..., :2] / draw.joint[..., 2:] * draw.focal[:, None] + draw.princpt[:, None]
    boxes = np.concatenate([pixel.min(1), pixel.max(1)], axis=1)
    hands = predictor.predict(images, list(boxes), draw.focal, draw.princpt)
    target = draw.joint - draw.joint[:, :1]
    found = hands.joint_cam.astype(np.float64) - hands.joint_cam[:, :1]
    rel = np.linalg.norm(found - target, axis=2).mean()
    aligned = align_procrustes(found, target, np.ones(target.shape[:2], bool))
    assert rel < 25.0, f"root-relative {rel:.1f} mm; a constant prediction has about 90"
    assert np.linalg.norm(aligned - target, axis=2).mean() < 12.0, "a constant pose has about 17 mm"
    off = np.linalg.norm(hands.joint_img - pixel, axis=2) / np.ptp(pixel, axis=1).max(axis=1)[:, None]
    assert (off < 0.1).mean() > 0.8, "PCK at 0.1 of the box"
    assert size_mb(HAND_MINI) <= 16
