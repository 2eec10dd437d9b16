"""PoseNet: shapes, cameras, gradients, weights from a Hugging Face folder; predictions never use ground truth."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model

from src.batch import Batch
from src.geometry.camera import project
from src.hand.standin.build import build_standin_hand
from src.loss import loss_sums
from src.model.attention import attend
from src.model.net import PoseNet
from src.model.tokens import camera_features, sincos_position, token_centres
from tests.helpers import compose_config, random_batch, small_config

READ_FIELDS = {"patch", "patch_focal", "patch_princpt"}


@pytest.fixture(scope="module")
def net() -> PoseNet:
    torch.manual_seed(0)
    return PoseNet(small_config().MODEL, build_standin_hand()).eval()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return random_batch(3, 56)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_the_fused_kernels(dtype: torch.dtype) -> None:
    """The explicit computation, for bfloat16 on a CPU and for dropout, equals PyTorch's own."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, num, 8, generator=random).to(dtype) for num in (5, 7, 7))
    wanted, atol = F.scaled_dot_product_attention(q, k, v), 1e-6 if dtype == torch.float32 else 0.03
    assert torch.allclose(attend(q, k, v), wanted, atol=atol)
    assert torch.allclose(attend(q, k, v, drop=torch.nn.Identity()), wanted, atol=atol)
    assert torch.equal(attend(q, k, v, drop=torch.zeros_like), torch.zeros_like(wanted))


def test_shapes_and_consistency(net: PoseNet, batch: Batch) -> None:
    out = net(batch)
    num_vertex = net.hand.num_vertex
    shapes = {f.name: tuple(getattr(out, f.name).shape) for f in fields(out)}
    assert shapes == {
        "mano_rotmat": (3, 16, 3, 3),
        "mano_pose": (3, 48),
        "mano_shape": (3, 10),
        "root_cam": (3, 3),
        "joint_cam": (3, 21, 3),
        "vert_cam": (3, num_vertex, 3),
        "joint_patch": (3, 21, 2),
        "joint_seen": (3, 21, 2),
        "joint_heat": (3, *[net.backbone.grid_size] * 2, 21),
    }
    assert torch.allclose(net.hand.pose_to_rotmat(out.mano_pose, True), out.mano_rotmat, atol=1e-4)
    assert torch.allclose(out.joint_cam[:, 0], out.root_cam, atol=1e-3)
    assert torch.allclose(project(out.joint_cam, batch.patch_focal, batch.patch_princpt), out.joint_patch, atol=1e-3)


def test_starts_in_the_middle_of_the_patch(net: PoseNet, batch: Batch) -> None:
    """Before training the wrist is near the patch centre, at a typical depth for that zoom."""
    out = net(batch)
    assert (out.joint_patch[:, 0] - 27.5).abs().max() < 6
    assert torch.allclose(out.root_cam[:, 2], torch.tensor(2.0 * 300.0), rtol=0.15)


def test_predictions_never_use_ground_truth(net: PoseNet, batch: Batch) -> None:
    noise = {
        f.name: torch.rand_like(value.float()).to(value.dtype)
        for f in fields(batch)
        if hasattr(value := getattr(batch, f.name), "dtype") and f.name not in READ_FIELDS
    }
    first, second = net(batch), net(replace(batch, **noise))
    for f in fields(first):
        assert torch.equal(getattr(first, f.name), getattr(second, f.name)), f.name


def test_predictions_depend_on_the_camera(net: PoseNet, batch: Batch) -> None:
    """Another focal length or principal point changes the prediction for the same pixels."""
    base = net(batch)
    for field, change in (("patch_focal", 1.5), ("patch_princpt", 4.0)):
        other = net(replace(batch, **{field: getattr(batch, field) * change}))
        assert not torch.allclose(other.mano_rotmat, base.mano_rotmat, atol=1e-7), field
        assert not torch.allclose(other.root_cam, base.root_cam), field


def test_camera_features_are_rays_in_token_order() -> None:
    focal, princpt = torch.tensor([[100.0, 200.0]]), torch.tensor([[10.0, 20.0]])
    feature = camera_features(token_centres(4, 14), focal, princpt, img_size=56)
    assert feature.shape == (1, 16, 3)
    column, row = 3, 1  # token 1 * 4 + 3; its centre is at 14 * index + 6.5 px
    assert feature[0, row * 4 + column, :2].tolist() == pytest.approx([(48.5 - 10) / 100, (20.5 - 20) / 200])


def test_position_embedding_differs_between_tokens() -> None:
    position = sincos_position(grid_size=6, dim=32)
    assert torch.pdist(position).min() > 0.3
    assert position.abs().max() <= 1


def test_every_parameter_gets_a_gradient(batch: Batch) -> None:
    """Every parameter that requires a gradient gets one; DDP would wait for it forever otherwise."""
    net = PoseNet(small_config().MODEL, build_standin_hand()).train()
    loss_sums(net(batch), batch, net.hand).sum().backward()
    without = [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


def test_parameter_groups() -> None:
    net = PoseNet(small_config().MODEL, build_standin_hand())
    groups = net.parameter_groups(1e-4, 1e-5, 0.01)
    assert sorted((g["lr"], g["weight_decay"]) for g in groups) == [(1e-5, 0), (1e-5, 0.01), (1e-4, 0), (1e-4, 0.01)]
    count = sum(p.numel() for g in groups for p in g["params"])
    assert count == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert {g["lr"] for g in net.parameter_groups(1e-4, None, 0.01)} == {1e-4}
    assert not any(p.requires_grad for p in net.backbone.parameters()), "null freezes the backbone"


def test_hugging_face_folder(tmp_path: Path, batch: Batch) -> None:
    """Weights that transformers saved at another resolution give the tokens of transformers, despite its dropout."""
    torch.manual_seed(1)
    shape = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=14,
        image_size=98,
        hidden_dropout_prob=0.3,
    )
    reference = Dinov2Model(shape).eval()
    reference.save_pretrained(tmp_path / "dinov2")
    overrides = ("MODEL.backbone.random_init=false", f"MODEL.backbone.backbone_str={tmp_path}/dinov2")
    net = PoseNet(small_config(*overrides).MODEL, build_standin_hand()).train()
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = reference(pixel_values=image).last_hidden_state[:, 1:]
        assert torch.allclose(net.backbone(image), expected, atol=1e-5), (
            "also in training mode: its own dropout is removed"
        )


def test_wrong_patch_size_is_named() -> None:
    cfg = compose_config("stage1-demo", "backbone=tiny", "MODEL.img_size=85")
    with pytest.raises(ValueError, match=r"MODEL\.img_size=85.*14"):
        PoseNet(cfg.MODEL, build_standin_hand())


def test_autocast_keeps_the_hand_in_float32(net: PoseNet, batch: Batch) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(batch)
    assert {getattr(out, f.name).dtype for f in fields(out)} == {torch.float32}


def test_state_dict_holds_no_hand(net: PoseNet) -> None:
    """MANO's licence forbids redistribution: a checkpoint must not contain its arrays."""
    assert not [name for name in net.state_dict() if name.startswith("hand.")]
