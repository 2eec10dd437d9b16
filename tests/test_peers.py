"""The rebuilt peers follow their publications; `bench.py accuracy` keeps and reports what it has measured."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from script.benchmarks import accuracy
from script.benchmarks.peers import PEERS
from script.benchmarks.peers.csvit import CsVitNet, finger_length
from script.benchmarks.peers.hamer import HamerNet
from src.batch import Batch
from src.geometry.camera import project
from src.hand.standin.build import build_standin_hand
from tests.helpers import ROOT, compose_config, random_batch, small_config

RESULTS = ROOT / "docs/figures/data/accuracy.json"
READ_FIELDS = {"patch", "patch_focal", "patch_princpt"}


@pytest.fixture(params=PEERS)
def net(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return PEERS[request.param](small_config().MODEL, build_standin_hand())


@pytest.fixture
def batch() -> Batch:
    return random_batch(3, 56)


def test_prediction_is_complete_and_in_front_of_the_camera(net: torch.nn.Module, batch: Batch) -> None:
    out = net.eval()(batch)
    assert out.joint_cam.shape == (3, 21, 3)
    assert out.vert_cam.shape == (3, net.hand.num_vertex, 3)
    assert (out.joint_cam[..., 2] > 0).all()
    assert torch.allclose(out.joint_cam[:, 0], out.root_cam, atol=1e-3)
    assert torch.allclose(project(out.joint_cam, batch.patch_focal, batch.patch_princpt), out.joint_patch, atol=1e-3)


def test_readout_is_float32_under_autocast(net: torch.nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        token = net.eval().decode(batch)
        wanted = net.read_out(token, batch).joint_cam
        net.decode = lambda batch: token
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = net(batch).joint_cam
    assert torch.equal(found, wanted)


def test_prediction_does_not_depend_on_the_target(net: torch.nn.Module, batch: Batch) -> None:
    other = replace(random_batch(3, 56, seed=1), **{name: getattr(batch, name) for name in READ_FIELDS})
    first, second = net.eval()(batch), net(other)
    for name in ("joint_cam", "vert_cam", "mano_shape"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_every_parameter_learns_and_the_loss_decreases(net: torch.nn.Module, batch: Batch) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = net.training_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    without = [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    single = "self_attention.to_query"  # a single query attends only to itself: its query map has no gradient
    assert [name for name in without if single not in name] == []
    assert losses[-1] < 0.9 * losses[0]


def test_unlabelled_samples_have_zero_loss(net: torch.nn.Module, batch: Batch) -> None:
    flags = ("joint_2d_valid", "joint_3d_valid", "has_mano", "has_intr")
    assert net.training_loss(replace(batch, **{f: torch.zeros_like(getattr(batch, f)) for f in flags})) == 0


def test_weak_perspective_matches_the_full_camera(batch: Batch) -> None:
    """HaMeR's keypoints, of a camera that looks at the patch centre, are at the same pixels as the projected joints."""
    torch.manual_seed(0)
    net = HamerNet(small_config().MODEL, build_standin_hand()).eval()
    batch = replace(batch, patch_princpt=batch.patch_princpt + torch.tensor([9.0, -4.0]))
    torch.nn.init.normal_(net.to_camera.weight, std=0.05)
    out = net(batch)
    expected = out.keypoint_2d * 56 + 27.5
    assert (out.joint_patch - expected).abs().max() < 1.0, "up to the parallax within the hand"
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
    """Equal seeds give equal initial weights of the backbone, whatever decoder follows."""
    cfg, tokens = small_config(), []
    image = torch.randn(2, 3, 56, 56)
    for peer in (accuracy.OurNet, *PEERS.values()):
        torch.manual_seed(5)
        hand = build_standin_hand()
        net = peer(cfg.MODEL, hand)
        tokens.append(net.backbone(image))
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


def test_interrupted_bench_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    monkeypatch.setattr(accuracy, "QUICK", {"step": 2, "train": 60, "val": 20, "seeds": [0, 1]})
    small = [
        "MODEL.handec={dim: 32, num_layer: 1, num_head: 2, dim_head: 16, dim_mlp: 64}",
        *(f"MODEL.backbone.{key}" for key in ("hidden_size=32", "num_layer=1", "num_head=2")),
    ]
    network = ["--backbone", "tiny", "--img-size", "56", *small]
    args = parser.parse_args(["--quick", "--out", str(tmp_path), "--batch", "4", *network])
    trained: list[str] = []
    train = accuracy.train_network

    def counting(net: torch.nn.Module, cfg: object, settings: dict, *rest: object) -> None:
        trained.append(f"{settings['method']}, seed {settings['seed']}")
        if len(trained) == 3:  # of six cells
            raise KeyboardInterrupt
        train(net, cfg, settings, *rest)

    monkeypatch.setattr(accuracy, "train_network", counting)
    with pytest.raises(KeyboardInterrupt):
        accuracy.run(args, lambda text: None)
    first = len(trained)
    figures = accuracy.run(args, lambda text: None)
    assert trained[first:] == ["csvit, seed 0", *(f"{m}, seed 1" for m in accuracy.METHODS)]
    assert accuracy.run(args, lambda text: None) == figures, "everything is in the results file"
    assert len(trained) == first + 4
    assert {f.name for f in figures} >= {"mpjpe_rel, ours", "mpjpe_cam, csvit", "mpjpe_pa, ours over the better peer"}
    value = {f.name: f.value for f in figures}
    assert 60 < value["mpjpe_rel, image-independent baseline"] < 140, "hands in all orientations"
    assert 5 < value["mpjpe_pa, image-independent baseline"] < 30


def test_documented_table_is_that_of_the_stored_cells(capsys: pytest.CaptureFixture[str]) -> None:
    figures = accuracy.reported(RESULTS)
    assert capsys.readouterr().out.strip() in (ROOT / "docs/ABLATIONS.md").read_text(encoding="utf-8")
    spread = [f.note for f in figures if f.unit == "mm"]
    assert len(spread) == 9, "three metrics of three methods"
    assert all("over 3 seeds" in note for note in spread), "the main row, nothing else"


def test_report_separates_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells that were trained from other weights get rows of their own and do not enter the comparison."""
    cells = list(json.loads(RESULTS.read_text(encoding="utf-8")).values())
    weights = accuracy.weights_digest(compose_config("stage1-demo").MODEL.backbone)
    cells = [cell for cell in cells if accuracy.is_main(cell["settings"], weights)]
    other = [{**cell, "settings": cell["settings"] | {"weights": "0123"}} for cell in cells]
    for cell in other:
        cell["metrics"] = {name: 2 * value for name, value in cell["metrics"].items()}
    (tmp_path / "old.json").write_text(json.dumps({str(i): cell for i, cell in enumerate(cells)}))
    (tmp_path / "new.json").write_text(json.dumps({str(i): cell for i, cell in enumerate([*other, *cells])}))
    alone = accuracy.reported(tmp_path / "old.json")
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3
    assert accuracy.reported(tmp_path / "new.json") == alone
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 6
    assert sum("| weights 0123 |" in row for row in rows) == sum(f"| weights {weights} |" in row for row in rows) == 3


@pytest.mark.parametrize("method", PEERS)
def test_peer_loss_weights(method: str) -> None:
    published = PEERS[method].LOSS_WEIGHT
    assert set(accuracy.peer_weights(published, method, [])) == set(published)
    term = next(iter(published))
    assert accuracy.peer_weights(published, method, [f"{term}=7"])[term] == 7.0
    with pytest.raises(SystemExit, match="no term nonsense; it has"):
        accuracy.peer_weights(published, method, ["nonsense=1"])
    with pytest.raises(SystemExit, match="could not convert"):
        accuracy.peer_weights(published, method, [f"{term}=much"])


def test_report_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no file"):
        accuracy.reported(tmp_path / "accuracy.json")


def test_new_weights_make_a_new_cell(tmp_path: Path) -> None:
    """After the file of weights has changed, cells trained from the old ones are not reused."""
    cfg = compose_config("stage1-demo", f"MODEL.backbone.backbone_str={tmp_path}")
    digests = []
    for content in (b"one", b"two"):
        (tmp_path / "model.safetensors").write_bytes(content)
        digests.append(accuracy.digest_of(accuracy.cell_settings(cfg, "ours", 0, 5e-4)))
    assert digests[0] != digests[1]
    assert accuracy.weights_digest(small_config().MODEL.backbone) is None
