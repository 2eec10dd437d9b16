"""Shared by several tests: shipped configurations composed by Hydra, and small synthetic batches."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from src.batch import Batch
from src.config import Config
from src.config_parse import parse_config
from src.geometry.camera import project

ROOT = Path(__file__).resolve().parents[1]
REALHANDS = ROOT.parent / "shared" / "realhands"


def compose_config(name: str, *overrides: str) -> Config:
    """The shipped configuration `name` with overrides, typed and checked."""
    with initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        return parse_config(compose(name, overrides=list(overrides)))


def small_config(*overrides: str) -> Config:
    """The demo's configuration with a network so small that a forward pass takes milliseconds."""
    decoder = "MODEL.handec={dim: 32, num_layer: 2, num_head: 2, dim_head: 16, dim_mlp: 64}"
    backbone = [
        "backbone=tiny",
        "MODEL.backbone.hidden_size=32",
        "MODEL.backbone.num_layer=2",
        "MODEL.backbone.num_head=2",
    ]
    return compose_config("stage1-demo", "MODEL.img_size=56", decoder, *backbone, *overrides)


def random_batch(num: int, img_size: int, seed: int = 0, right_only: bool = True) -> Batch:
    """Noise patches with a hand-sized cloud of joints in front of the camera; all labels are valid."""
    rng = torch.Generator().manual_seed(seed)
    focal = torch.full((num, 2), 2.0 * img_size)
    princpt = torch.full((num, 2), (img_size - 1) / 2)
    joint_cam = torch.randn(num, 21, 3, generator=rng) * 40 + torch.tensor([0.0, 0.0, 600.0])
    return Batch(
        key=[f"noise/{i}" for i in range(num)],
        source=["noise"] * num,
        position=torch.arange(num),
        is_right=torch.ones(num, dtype=torch.bool) if right_only else torch.rand(num, generator=rng) < 0.5,
        patch=torch.randint(0, 256, (num, 3, img_size, img_size), generator=rng, dtype=torch.uint8),
        patch_focal=focal,
        patch_princpt=princpt,
        cam_rot=torch.eye(3).repeat(num, 1, 1),
        image_to_patch=torch.eye(3).repeat(num, 1, 1),
        joint_patch=project(joint_cam, focal, princpt),
        joint_2d_valid=torch.ones(num, 21),
        joint_cam=joint_cam,
        joint_3d_valid=torch.ones(num, 21),
        mano_pose=0.3 * torch.randn(num, 48, generator=rng),
        mano_shape=torch.randn(num, 10, generator=rng),
        has_mano=torch.ones(num),
        flat_hand_mean=torch.ones(num, dtype=torch.bool),
        has_intr=torch.ones(num),
    )
