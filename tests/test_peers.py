"""The peers' decoders are what they claim to be; the bench that compares us with them keeps what it has measured."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from script.benchmarks import accuracy, accuracy_train
from script.benchmarks.peers import PEERS, load_peer
from script.benchmarks.peers.csvit import CsVitNet, finger_length
from script.benchmarks.peers.hamer import HamerNet
from src.batch import Batch
from src.geometry.camera import project
from src.hand.standin.build import build_standin_hand
from tests.helpers import compose_config, random_batch, small_config

READ_FIELDS = {"patch", "patch_focal", "patch_princpt"}


@pytest.fixture(params=PEERS)
def net(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return load_peer(request.param)(small_config().MODEL, build_standin_hand())


@pytest.fixture
def batch() -> Batch:
    return random_batch(3, 56)


def test_prediction_is_whole_and_before_the_camera(net: torch.nn.Module, batch: Batch) -> None:
    out = net.eval()(batch)
    assert out.joint_cam.shape == (3, 21, 3)
    assert out.vert_cam.shape == (3, net.hand.num_vertex, 3)
    assert (out.joint_cam[..., 2] > 0).all()
    assert torch.allclose(out.joint_cam[:, 0], out.root_cam, atol=1e-3)
    assert torch.allclose(project(out.joint_cam, batch.patch_focal, batch.patch_princpt), out.joint_patch, atol=1e-3)


def test_reads_out_in_float32_whatever_the_precision(net: torch.nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        token = net.eval().decode(batch)
        wanted = net.read_out(token, batch).joint_cam
        net.decode = lambda batch: token
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = net(batch).joint_cam
    assert torch.equal(found, wanted)


def test_nothing_of_the_target_reaches_a_prediction(net: torch.nn.Module, batch: Batch) -> None:
    other = replace(random_batch(3, 56, seed=1), **{name: getattr(batch, name) for name in READ_FIELDS})
    first, second = net.eval()(batch), net(other)
    for name in ("joint_cam", "vert_cam", "mano_shape"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_every_parameter_learns_and_the_loss_falls(net: torch.nn.Module, batch: Batch) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = net.training_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    without = [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    lonely = "self_attention.to_query"  # a single query attends to itself whatever it asks
    assert [name for name in without if lonely not in name] == []
    assert losses[-1] < 0.9 * losses[0]


def test_unlabelled_samples_cost_nothing(net: torch.nn.Module, batch: Batch) -> None:
    flags = ("joint_2d_valid", "joint_3d_valid", "has_mano", "has_intr")
    assert net.training_loss(replace(batch, **{f: torch.zeros_like(getattr(batch, f)) for f in flags})) == 0


def test_weak_perspective_becomes_the_full_camera(batch: Batch) -> None:
    """HaMeR's keypoints are those of a camera that looks at the patch's middle; in ours they meet the same pixels."""
    torch.manual_seed(0)
    net = HamerNet(small_config().MODEL, build_standin_hand()).eval()
    batch = replace(batch, patch_princpt=batch.patch_princpt + torch.tensor([9.0, -4.0]))
    torch.nn.init.normal_(net.to_camera.weight, std=0.05)
    out = net(batch)
    expected = out.keypoint_2d * 56 + 27.5
    assert (out.joint_patch - expected).abs().max() < 1.0, "all but the parallax of the hand's own depth"
    assert torch.allclose(out.joint_patch[:, 0], expected[:, 0], atol=1e-2), "the wrist exactly"


def test_hamer_starts_from_the_mean_hand(batch: Batch) -> None:
    torch.manual_seed(0)
    net = HamerNet(small_config().MODEL, build_standin_hand()).eval()
    mean = torch.cat([torch.zeros(3), net.hand.mean_pose]).expand(3, -1)
    assert torch.allclose(net(batch).mano_rotmat, net.hand.pose_to_rotmat(mean, True), atol=0.3)
    assert torch.allclose(net(batch).root_cam[:, 2], torch.tensor(600.0), rtol=0.1), "0.3 m across the patch at f = 2 S"


def test_csvit_wrist_is_a_mean_over_bins_in_finger_lengths(batch: Batch) -> None:
    torch.manual_seed(0)
    net = CsVitNet(small_config().MODEL, build_standin_hand()).eval()
    net.fit(batch)
    place = batch.joint_cam[:, 0] / finger_length(batch.joint_cam)
    assert net.bin2[0] == pytest.approx((place.mean(0) - 5 * place.std(0))[2].item(), rel=1e-4)
    out = net(batch)
    length = finger_length(out.joint_cam)
    assert torch.allclose(out.root_cam, out.place * length, rtol=1e-3)
    target = out.place.detach()
    sharp = tuple(
        (-(target[:, a, None] - getattr(net, f"bin{a}")).square() / (2 * 0.09**2)).log_softmax(1) for a in range(3)
    )
    assert (net._heatmap_loss(sharp, target) < net._heatmap_loss(out.log_heatmap, target)).all()
    assert (net._heatmap_loss(sharp, target) < net._heatmap_loss(sharp, target + 0.5)).all()


def test_csvit_pose_is_relative_to_the_mean_pose(batch: Batch) -> None:
    net = CsVitNet(small_config().MODEL, build_standin_hand())
    relative = replace(batch, flat_hand_mean=torch.zeros(3, dtype=torch.bool))
    assert torch.equal(net._target_pose(relative), batch.mano_pose)
    rotmat = net.hand.pose_to_rotmat(net._target_pose(batch), False)
    assert torch.allclose(rotmat, net.hand.pose_to_rotmat(batch.mano_pose, True), atol=1e-5)


def test_same_backbone_for_all(batch: Batch) -> None:
    """Equal seeds give equal first weights of the backbone, whatever decoder follows."""
    cfg, tokens = small_config(), []
    image = torch.randn(2, 3, 56, 56)
    for build in (lambda c, h: accuracy.OurNet(c, h), *(lambda c, h, n=n: load_peer(n)(c.MODEL, h) for n in PEERS)):
        torch.manual_seed(5)
        tokens.append(build(cfg, build_standin_hand()).backbone(image))
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


def test_bench_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    monkeypatch.setattr(accuracy, "QUICK", {"step": 2, "train": 60, "val": 20, "seeds": [0, 1]})
    small = [
        "MODEL.handec={dim: 32, num_layer: 1, num_head: 2, dim_head: 16, dim_mlp: 64}",
        *(f"MODEL.backbone.{key}" for key in ("hidden_size=32", "num_layer=1", "num_head=2")),
    ]
    network = ["--backbone", "tiny", "--img-size", "56", *small]
    args = parser.parse_args(["--quick", "--out", str(tmp_path), "--batch", "4", *network])
    args.compose, args.peer = lambda name, overrides: compose_config(name, *overrides), load_peer
    trained: list[str] = []
    train = accuracy_train.train_network

    def counting(*arguments: object) -> None:
        trained.append(str(arguments[7]))
        if len(trained) == 3:  # of six cells
            raise KeyboardInterrupt
        train(*arguments)

    monkeypatch.setattr(accuracy_train, "train_network", counting)
    with pytest.raises(KeyboardInterrupt):
        accuracy.run(args, lambda text: None)
    first = len(trained)
    figures = accuracy.run(args, lambda text: None)
    assert trained[first:] == ["csvit, seed 0", *(f"{m}, seed 1" for m in accuracy.METHODS)]
    assert accuracy.run(args, lambda text: None) == figures, "everything found, nothing trained anew"
    assert len(trained) == first + 4
    assert {f.name for f in figures} >= {"mpjpe_rel, ours", "mpjpe_cam, csvit", "mpjpe_pa, ours over the better peer"}
    constant = {f.name: f.value for f in figures if "without looking" in f.name}
    assert 60 < constant["mpjpe_rel, without looking"] < 140, "the mean of hands turned every way"
    assert 5 < constant["mpjpe_pa, without looking"] < 30


def test_documented_table_is_what_the_stored_cells_say(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).resolve().parents[1]
    figures = {f.name: f for f in accuracy.reported(root / "docs/figures/data/accuracy.json")}
    assert capsys.readouterr().out.strip() in (root / "docs/ABLATIONS.md").read_text(encoding="utf-8")
    assert all("over 3 seeds" in f.note for f in figures.values() if f.unit == "mm"), "the main row, nothing else"


@pytest.mark.parametrize("method", ["hamer", "csvit"])
def test_weights_of_a_peers_losses(method: str) -> None:
    published = load_peer(method).LOSS_WEIGHT
    assert set(accuracy.peer_weights(published, method, [])) == set(published)
    term = next(iter(published))
    assert accuracy.peer_weights(published, method, [f"{term}=7"])[term] == 7.0
    with pytest.raises(SystemExit, match="no term nonsense; it has"):
        accuracy.peer_weights(published, method, ["nonsense=1"])
    with pytest.raises(SystemExit, match="could not convert"):
        accuracy.peer_weights(published, method, [f"{term}=much"])


def test_report_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no file"):
        accuracy.reported(tmp_path / "accuracy.json")


def test_a_cell_belongs_to_its_weights(tmp_path: Path) -> None:
    """New weights under the same name are another experiment: an earlier cell is not taken for theirs."""
    cfg = compose_config("stage1-demo", f"MODEL.backbone.backbone_str={tmp_path}")
    digests = []
    for content in (b"one", b"two"):
        (tmp_path / "model.safetensors").write_bytes(content)
        digests.append(accuracy.digest_of(accuracy.cell_settings(cfg, "ours", 0, 5e-4)))
    assert digests[0] != digests[1]
    assert accuracy.weights_digest(small_config().MODEL.backbone) is None
