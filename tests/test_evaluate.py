"""script/evaluate.py from checkpoint to output folder, and its parts: intervals, tables, sheets, submissions."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from script.evaluate import compose, main
from src.batch import Sample
from src.checkpoint.network import load_network
from src.config import ConfigError
from src.data.augment import Augmentation
from src.data.convert.annotate import MANO_21, OPENGL_TO_OPENCV, plain_key
from src.data.crop import crop_samples
from src.data.demo.make import make_demo_shards
from src.data.loader import build_val_loader
from src.evaluate import hand_sheets
from src.evaluate.bootstrap import Bootstrap, Estimate, Group, summarise
from src.evaluate.run import to_source_camera
from src.evaluate.submission import write_submission
from src.evaluate.tables import joint_grids, metric_grid, summary_grids
from src.evaluate.write import legend
from src.hand.skeleton import JOINT_NAMES
from src.hand.standin.build import build_standin_hand
from src.metric import SampleMetric, Samples
from src.model.net import PoseNet
from src.train.validation import describe, evaluate, key_metric
from tests.data_shards import lab_sample, write_shard
from tests.helpers import ROOT, random_batch, small_config
from tests.test_predict import make_run

NUM = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a network of random weights, and rendered hands."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_run(folder / "run")
    make_demo_shards(folder / "shards", {"val": NUM}, seed=0, img_size=64, num_process=1)
    return folder


def overrides(place: Path) -> list[str]:
    return [f"DATA.root={place}/shards", "DATA.val.source=[val/*]", "TRAIN.sample_per_device=5"]


@pytest.fixture(scope="module")
def result(place: Path) -> dict:
    """result.json of one evaluation, in the run folder."""
    assert main([str(place / "run"), *overrides(place), "--num_bootstrap=200"]) == 0
    return json.loads((place / "run/evaluation/step-7/result.json").read_text())


# ---- the script ------------------------------------------------------------------------------------------------------


def test_output_files(place: Path, result: dict) -> None:
    folder = place / "run/evaluation/step-7"
    names = ["joint_error.png", "pck.png", "random.png", "report.md", "result.json", "samples.csv", "worst.png"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert (result["step"], result["num_sample"], result["hand_model"]) == (7, NUM, "standin")
    assert [g["name"] for g in result["groups"]] == ["all", "left", "right"]
    assert sum(g["num_sample"] for g in result["groups"][1:]) == NUM
    with (folder / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["key"] for row in rows) == [f"demo_val_{i:06d}/0" for i in range(NUM)]
    for group in result["groups"]:
        own = [float(r["mpjpe_rel"]) for r in rows if group["name"] in ("all", r["side"])]
        assert group["metric"]["mpjpe_rel"]["value"] == pytest.approx(np.mean(own), rel=1e-5)
        joints = [e["value"] for e in group["joint"]["rel"].values()]
        assert (len(joints), np.mean(joints)) == (21, pytest.approx(np.mean(own), rel=1e-5))
    every = result["groups"][0]
    for name in ("pck05_2d", "pck10_2d", "pck15_2d", "pck20_2d", "auc_2d"):
        assert all(set(group["metric"][name]) == {"value", "low", "high", "num_sample"} for group in result["groups"])
        assert name in rows[0]
    assert len(every["pck_curve"]["joint_2d"]) == len(result["pck_thresholds_2d"]) == 100
    assert every["metric"]["auc_2d"]["num_sample"] == NUM
    report = (folder / "report.md").read_text()
    assert "2D PCK at 0.15 box, %" in report
    assert "2D in shares of the hand's box" in report
    assert "F@15 mm" in report
    assert "side left, mean error of each joint" in report


def test_same_metrics_as_in_validation(place: Path, result: dict) -> None:
    """The same frames and definitions as in training."""
    cfg = small_config("DATA.demo=null", "MODEL.hand_model=standin", *overrides(place))
    net = load_network(place / "run").network
    expected = evaluate(net, build_val_loader(cfg, "standin"), Accelerator(cpu=True), cfg.LOSS)[0]
    got = result["groups"][0]["metric"]
    for name in ("mpjpe_cam", "mpjpe_rel", "mpjpe_pa", "mpvpe_rel", "root_error"):
        assert got[name]["value"] == pytest.approx(expected[name], rel=1e-6), name
        assert got[name]["low"] < got[name]["value"] < got[name]["high"]


def test_halves(place: Path, tmp_path: Path, result: dict, capsys: pytest.CaptureFixture[str]) -> None:
    keys = []
    for half in ("a", "b"):
        options = ["--num_bootstrap=100", "--num_overlay=0", f"--output={tmp_path}/{half}", f"--half={half}"]
        assert main([str(place / "run"), *overrides(place), *options]) == 0
        assert json.loads((tmp_path / half / "result.json").read_text())["half"] == half
        assert f"half {half} of the samples" in (tmp_path / half / "report.md").read_text()
        with (tmp_path / half / "samples.csv").open() as file:
            keys += [row["key"] for row in csv.DictReader(file)]
    assert result["half"] is None
    assert sorted(keys) == [f"demo_val_{i:06d}/0" for i in range(NUM)]
    with pytest.raises(SystemExit):
        main([str(place / "run"), "--half=a", "--submission=freihand"])
    assert "remove --half" in capsys.readouterr().err
    for _ in range(2):
        assert main([str(place / "run"), *overrides(place), "--num_bootstrap=100", "--num_overlay=0", "--half=b"]) == 0
    assert {path.name for path in (place / "run/evaluation").glob("*-half-*")} == {"step-7-half-b", "step-7-half-b-2"}


def test_nothing_is_overwritten(place: Path, result: dict, capsys: pytest.CaptureFixture[str]) -> None:
    before = (place / "run/evaluation/step-7/result.json").read_bytes()
    again = [str(place / "run"), *overrides(place), "--num_bootstrap=100", "--num_overlay=0", "DATA.val.max_sample=6"]
    assert main(again) == 0
    assert json.loads((place / "run/evaluation/step-7-2/result.json").read_text())["num_sample"] == 6
    assert (place / "run/evaluation/step-7/result.json").read_bytes() == before
    assert main([*again, f"--output={place}/run"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_an_interrupted_evaluation_leaves_no_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it is killed: nothing is created before the predictions are complete."""
    before = sorted((place / "run").rglob("*"))

    def interrupt(*_args: object, **_kwargs: object) -> None:
        assert sorted((place / "run").rglob("*")) == before
        raise KeyboardInterrupt

    monkeypatch.setattr("src.evaluate.run.collect", interrupt)
    assert main([str(place / "run"), *overrides(place)]) == 130
    assert sorted((place / "run").rglob("*")) == before


def test_an_output_that_cannot_be_created_fails_early(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("src.evaluate.run.collect", lambda *_: pytest.fail("predicted first"))
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file/below"):
        assert main([str(place / "run"), *overrides(place), f"--output={output}"]) == 2
        assert f"cannot create {output}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA.vall.source=[a]"], r"DATA\.vall\.source: there is no such key; did you mean DATA\.val\.source"),
        (["DATA.val.source=[nix/*]"], r"DATA\.val\.source=\['nix/\*'\]: no \*\.tar file below"),
        (["data=labz"], "choose one of demo, labs"),
        (["backbone=tiny"], "uses the checkpoint's network"),
        (["MODEL.hand_model=nix.pkl"], r"MODEL\.hand_model=nix\.pkl: there is no such file"),
        (["DATA.val.source=[a"], "quote lists"),
    ],
)
def test_configuration_errors(place: Path, arguments: list[str], message: str, capsys) -> None:
    before = sorted((place / "run").rglob("*"))
    assert main([str(place / "run"), *overrides(place)[:1], *arguments]) == 2
    assert sorted((place / "run").rglob("*")) == before, "no folder is created"
    assert re.search(message, capsys.readouterr().err)


def test_help_does_not_import_torch() -> None:
    code = "import sys; from script.evaluate import parse_arguments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_configuration_is_the_checkpoints_with_overrides(tmp_path: Path) -> None:
    saved = asdict(small_config("GENERAL.val_seed=5", "DATA.demo.val_sample=3"))
    saved["GENERAL"]["key_of_an_older_version"] = 1
    del saved["GENERAL"]["prefetch_factor"]  # a key added after the checkpoint was written
    own = compose(saved, [], whole=False)
    assert (own.GENERAL.val_seed, own.MODEL.img_size, own.DATA.demo.val_sample) == (5, 56, 3)
    assert own.GENERAL.prefetch_factor == 2
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.tar").touch()
    other = compose(saved, [f"DATA.root={tmp_path}", "DATA.val.source={a: [a/*], b: [a/x.tar]}"], whole=True)
    assert other.DATA.demo is None, "no demo shards are rendered into a folder of real shards"
    assert (list(other.DATA.val.source), other.DATA.val.max_sample) == (["a", "b"], None)
    with pytest.raises(ConfigError, match=r"InterHand2\.6M/val"):
        compose(saved, ["data=labs", f"DATA.root={tmp_path}"], whole=False)


def test_data_sets_of_older_lab_shards(place: Path, tmp_path: Path) -> None:
    """Older shards do not name their data set; the folders below DATA.root do. --resample=clip draws whole clips."""
    for folder, numbers in (("InterHand2.6M/val", (1, 2)), ("DexYCB/s1/val", (3, 4, 5))):
        write_shard(tmp_path / folder / "0.tar", [lab_sample(n, 2, generation=1) for n in numbers])
    arguments = ["data=labs", f"DATA.root={tmp_path}", "GENERAL.num_worker=0", "TRAIN.sample_per_device=4"]
    options = [f"--output={tmp_path}/out", "--resample=clip", "--num_bootstrap=100"]
    assert main([str(place / "run"), *arguments, *options]) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["bootstrap"]["over"] == "clip"
    sizes = {g["name"]: g["num_sample"] for g in result["groups"] if g["kind"] == "source"}
    assert sizes == {"InterHand2.6M": 4, "DexYCB": 6}
    every = result["groups"][0]
    assert "mpvpe_rel" not in every["metric"], "parameters of another hand model are not a target"
    assert "wrist" not in every["joint"]["cam"], "a joint that is never valid is absent"
    assert "mpjpe_rel" not in every["metric"], "no wrist, no root-relative metric"
    assert every["metric"]["mpjpe_pa"]["num_sample"] == 10


def test_hands_with_only_the_wrist_in_3d(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As HO-3D's evaluation set: there is a root error and nothing root-relative; beside other hands they change none
    of those hands' numbers."""
    wrist = np.zeros((2, 21), np.float32)
    wrist[:, 0] = 1
    labs = {"whole": [lab_sample(n, 2, generation=2) for n in (1, 2)], "wrist": [lab_sample(3, 2, generation=2)]}
    for sample in labs["whole"]:
        sample["joint_3d_valid.npy"][:, 0] = 1
    labs["wrist"][0]["joint_3d_valid.npy"] = wrist
    result = {}
    for name, samples in labs.items():
        write_shard(tmp_path / name / "0.tar", samples)
    for name, source in {"whole": "[whole]", "wrist": "[wrist]", "both": "{whole: [whole], wrist: [wrist]}"}.items():
        options = [f"--output={tmp_path}/out-{name}", "--num_bootstrap=100", "--num_overlay=2"]
        folders = [f"DATA.root={tmp_path}", f"DATA.val.source={source}", "GENERAL.num_worker=0"]
        assert main([str(place / "run"), "data=labs", *folders, *options]) == 0
        result[name] = json.loads((tmp_path / f"out-{name}/result.json").read_text())["groups"][0]
    aligned = [name for name in result["whole"]["metric"] if "_rel" in name or "_pa" in name or "_st" in name]
    assert len(aligned) >= 13
    assert not set(aligned) & set(result["wrist"]["metric"])
    assert {"mpjpe_cam", "root_error"} <= set(result["wrist"]["metric"])
    assert list(result["wrist"]["joint"]) == ["cam"]
    assert not {"joint_rel", "joint_pa"} & set(result["wrist"]["pck_curve"])
    for name in aligned:
        value = result["whole"]["metric"][name]["value"]
        assert result["both"]["metric"][name]["value"] == pytest.approx(value, rel=1e-5), name
        assert result["both"]["metric"][name]["num_sample"] == 4
    assert result["both"]["pck_curve"]["joint_rel"] == result["whole"]["pck_curve"]["joint_rel"]
    assert "nan" not in capsys.readouterr().out


def test_validation_of_hands_with_only_the_wrist_in_3d() -> None:
    """The best checkpoint is chosen by an error that can change."""
    cfg, batch = small_config(), random_batch(4, 56)
    net = PoseNet(cfg.MODEL, build_standin_hand())
    whole = evaluate(net, [batch], Accelerator(cpu=True), cfg.LOSS)[0]
    batch.joint_3d_valid[:, 1:] = 0
    metrics = evaluate(net, [batch], Accelerator(cpu=True), cfg.LOSS)[0]
    assert not {"mpjpe_rel", "mpjpe_pa", "loss_joint_rel"} & metrics.keys()
    assert key_metric(metrics) == metrics["mpjpe_cam"] == metrics["root_error"] == whole["root_error"]
    batch.has_intr[:] = 0
    metrics = evaluate(net, [batch], Accelerator(cpu=True), cfg.LOSS)[0]
    assert key_metric(metrics) == metrics["loss_total"] > 0


def test_validation_reports_each_data_set() -> None:
    cfg, batch = small_config(), random_batch(4, 56)
    net = PoseNet(cfg.MODEL, build_standin_hand())
    batch.source = ["a", "b", "b", "a"]
    batch.joint_3d_valid[1:3] = 0  # b has no 3D
    metrics = evaluate(net, [batch], Accelerator(cpu=True), cfg.LOSS)[0]
    assert {name.partition("/")[2] for name in metrics} == {"", "a", "b"}
    assert metrics["mpjpe_rel/a"] == metrics["mpjpe_rel"]
    assert "mpjpe_rel/b" not in metrics
    assert not [name for name in metrics if name.startswith("loss") and "/" in name]
    lines = describe(metrics).splitlines()
    assert lines[0].startswith("mpjpe_cam=")
    assert [line.split(":")[0] for line in lines[1:]] == ["  a", "  b"]
    batch.source = ["a"] * 4
    assert not [name for name in evaluate(net, [batch], Accelerator(cpu=True), cfg.LOSS)[0] if "/" in name]


# ---- intervals and tables --------------------------------------------------------------------------------------------


def samples_of(value: np.ndarray, count: np.ndarray | None = None, clip: int = 1) -> Samples:
    """Samples with one metric [S]; `clip` consecutive samples share a clip."""
    num = len(value)
    count = np.ones(num) if count is None else count
    return Samples(
        position=np.arange(num),
        key=np.array([f"clip{i // clip}/{i % clip}" for i in range(num)], dtype=object),
        source=np.full(num, "a", dtype=object),
        is_right=np.ones(num, dtype=bool),
        metric={"mpjpe_rel": SampleMetric((value * count)[:, None], count[:, None])},
    )


def test_interval_has_the_theoretical_width() -> None:
    """For the mean of n independent values +-1.96 s / sqrt(n); copies of a value in one clip add no information."""
    rng = np.random.default_rng(0)
    value = rng.normal(30, 6, 400)
    once = summarise(samples_of(value), Bootstrap(4000))[0].metric["mpjpe_rel"]
    assert once.value == pytest.approx(value.mean(), rel=1e-12)
    half = 1.96 * value.std() / np.sqrt(len(value))
    assert (once.high - once.value, once.value - once.low) == pytest.approx((half, half), rel=0.1)
    clips = samples_of(np.repeat(value, 4), clip=4)
    whole = summarise(clips, Bootstrap(4000, "clip"))[0].metric["mpjpe_rel"]
    single = summarise(clips, Bootstrap(4000, "sample"))[0].metric["mpjpe_rel"]
    assert whole.high - whole.low == pytest.approx(once.high - once.low, rel=0.1)
    assert single.high - single.low == pytest.approx((once.high - once.low) / 2, rel=0.1)


def test_an_interval_needs_two_units_with_the_metric() -> None:
    """Draws of several clips, of which one has labels, have all the same mean."""
    samples = samples_of(np.arange(12.0), count=np.repeat([1.0, 0.0, 0.0], 4), clip=4)
    whole, single = (summarise(samples, Bootstrap(200, over))[0].metric["mpjpe_rel"] for over in ("clip", "sample"))
    assert (whole.value, whole.low, whole.high, whole.num_sample) == (1.5, None, None, 4)
    assert single.low < 1.5 < single.high


def with_joints(distance: np.ndarray, valid: np.ndarray) -> Samples:
    """Samples with the root-relative MPJPE over points and over joints: distance, valid [S, 21]."""
    each = SampleMetric(np.where(valid, distance, 0.0), valid.astype(float))
    pooled = SampleMetric(*(part.sum(axis=1, keepdims=True) for part in each))
    metric = {"mpjpe_rel": pooled, "mpjpe_rel_joints": each, "joint_rel": each}
    return replace(samples_of(np.zeros(len(distance))), metric=metric)


def test_intervals_of_the_mean_over_joints() -> None:
    """As if each draw were evaluated by itself; joints that a draw has not got do not count in it."""
    rng = np.random.default_rng(2)
    distance, valid = rng.gamma(2, 10, (9, 21)) + np.arange(21), rng.random((9, 21)) < 0.8
    valid[1:, 7] = False  # a joint that many draws have not got
    estimate = summarise(with_joints(distance, valid), Bootstrap(300))[0].metric["mpjpe_rel_joints"]

    def official(rows: np.ndarray) -> float:
        columns = zip(distance[rows].T, valid[rows].T)
        return float(np.mean([column[known].mean() for column, known in columns if known.any()]))

    draws = [official(rows) for rows in np.random.default_rng(0).integers(0, 9, (300, 9))]
    assert estimate.value == pytest.approx(official(np.arange(9)), rel=1e-12)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), rel=1e-9)
    assert estimate.num_sample == 9


def test_tables_name_the_average_where_joints_are_missing() -> None:
    rng = np.random.default_rng(2)
    distance, valid = rng.gamma(2, 10, (9, 21)) + np.arange(21), rng.random((9, 21)) < 0.8
    complete = np.ones((9, 21), bool)
    complete[:, 20] = False  # never annotated: no difference
    (group,) = groups = summarise(with_joints(distance, complete), Bootstrap(200))
    assert group.metric["mpjpe_rel_joints"] == group.metric["mpjpe_rel"]
    assert [row[0] for row in metric_grid(group).rows] == ["MPJPE, mm"]
    assert "over joints" not in legend(groups, Bootstrap())
    assert "Joints with 3D labels: 20 of 21 in all samples." in legend(groups, Bootstrap())
    (group,) = groups = summarise(with_joints(distance, valid), Bootstrap(200))
    values = [group.metric[name].value for name in ("mpjpe_rel", "mpjpe_rel_joints")]
    assert [row[0] for row in metric_grid(group).rows] == ["MPJPE, over points, mm", "MPJPE, over joints, mm"]
    assert [row[2].split()[0] for row in metric_grid(group).rows] == [f"{value:.1f}" for value in values]
    assert "official evaluations of InterHand2.6M" in legend(groups, Bootstrap())
    assert "Joints with 3D labels" not in legend(groups, Bootstrap())
    wrist, thumb, *_ = joint_grids(group)[0].rows
    assert (wrist[2], thumb[2][:1].isdigit()) == ("–", True), "the wrist relative to itself is not measured"


def test_a_mean_that_is_not_finite_has_no_interval() -> None:
    for wrong in (np.nan, np.inf):
        distance = np.full((5, 21), 3.0)
        distance[1, 4] = wrong
        metric = summarise(with_joints(distance, np.ones((5, 21), bool)), Bootstrap(100))[0].metric
        for estimate in metric.values():
            assert not np.isfinite(estimate.value)
            assert (estimate.low, estimate.high) == (None, None)


def test_means_are_over_points_and_absent_without_labels() -> None:
    value, count = np.array([1.0, 4.0, np.nan]), np.array([1.0, 3.0, 0.0])
    value = np.where(count > 0, value, 0.0)
    estimate = summarise(samples_of(value, count), Bootstrap(200))[0].metric["mpjpe_rel"]
    assert (estimate.value, estimate.num_sample) == (pytest.approx(13 / 4), 2)
    assert summarise(samples_of(value, np.zeros(3)), Bootstrap(200))[0].metric == {}
    alone = summarise(samples_of(value[:1]), Bootstrap(200))[0].metric["mpjpe_rel"]
    assert (alone.value, alone.low, alone.high) == (1.0, None, None)


def test_tables_fit_a_terminal_and_omit_absent_metrics() -> None:
    wide, score = Estimate(123.45, 100.12, 140.43, 123456), Estimate(0.5, 0.4, 0.6, 123455)
    everything = {f"{n}_{f}": wide for n in ("mpjpe", "mpvpe") for f in ("rel", "pa")}
    everything |= {f"{n}_{f}": score for n in ("auc", "f5") for f in ("cam", "rel", "pa")}
    everything |= {"mpjpe_st": wide, "mpjpe_cam": Estimate(1234.5, 1000.1, 1400.4, 123455)}
    joint = {frame: [wide] * 21 for frame in ("cam", "rel", "pa")}
    groups = [Group("all", "all", 123456, everything, joint, {})]
    groups += [Group("source", "a data set with a long name", 7, {"mpjpe_pa": wide}, {}, {})]
    console = Console(width=120)
    with console.capture() as capture:
        for grid in summary_grids(groups):
            console.print(grid.as_rich())
    text = capture.get()
    assert "…" not in text, "nothing is truncated"
    assert all(name in text for name in JOINT_NAMES)
    partial = metric_grid(groups[1]).as_markdown()
    assert "Procrustes" in partial
    assert not any(word in partial for word in ("camera", "root-relative", "MPVPE", "F@5", "0.0"))
    assert joint_grids(groups[1]) == []


def test_names_in_brackets_and_long_lines_are_printed_whole() -> None:
    """By default rich drops `[x]` as markup and wraps a job's log at 80 columns."""
    code = "from src.utils.console import console\nfrom src.utils.table import Grid\n"
    code += "console.print(Grid('runs [x]', ('', 'side [y]'), [('[z]', '[a] ' * 25)]).as_rich(), 'to [b]')"
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("runs [x]", "side [y]", "[z]", "to [b]", ("[a] " * 25).strip()))


# ---- left hands, sheets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_right", [True, False])
def test_predictions_return_to_the_source_camera(is_right: bool) -> None:
    """A target, cropped and rotated as in training, maps back to its coordinates in the shard."""
    rng = np.random.default_rng(1)
    joint = rng.normal([60, -30, 500], 40, (21, 3)).astype(np.float32)
    focal, princpt = np.array([300.0, 320.0]), np.array([79.5, 59.5])
    image = joint[:, :2] / joint[:, 2:] * focal + princpt
    one = np.ones(21, np.float32)
    sample = Sample(
        "k/0", "a", np.zeros((120, 160, 3), np.uint8), is_right, np.concatenate((image.min(0), image.max(0))),
        image, one, joint, one, np.zeros(48), np.zeros(10), False, True, focal, princpt, True,
    )  # fmt: skip
    batch = crop_samples([sample], [Augmentation(roll=0.7, tilt=(0.1, -0.2))], 56, 2.0).map(torch.from_numpy)
    assert not np.allclose(batch.joint_cam[0].numpy(), joint, atol=5)
    np.testing.assert_allclose(to_source_camera(batch.joint_cam, batch)[0], joint, atol=1e-3)


def test_left_hands_are_drawn_as_in_the_source_image() -> None:
    batch = random_batch(2, 64)
    batch.is_right[1] = False
    batch.patch[:] = 0
    batch.patch[:, :, :, :32] = 200  # the left half of the network's input
    batch.joint_patch[:] = 8.0  # near its top left corner
    net = PoseNet(small_config("MODEL.backbone.patch_size=16", "MODEL.img_size=64").MODEL, build_standin_hand()).eval()
    prediction = net(batch)
    right, left = (hand_sheets._hand(batch, prediction, i, "12.0 mm")[:176, :176] for i in range(2))
    assert (right[100, 30], left[100, 30]) == (pytest.approx([200] * 3), pytest.approx([0] * 3))
    assert (right[100, 150], left[100, 150]) == (pytest.approx([0] * 3), pytest.approx([200] * 3))
    assert (np.abs(right[22:25, 22:25].astype(int) - 200) > 20).any(), "joints are drawn at the hand"
    assert (left[22:25, 151:155] > 20).any()


def test_worst_and_random_samples() -> None:
    error = np.array([3.0, np.inf, -1.0, 9.0, 5.0])
    chosen = hand_sheets.choose(error, 3, seed=0)
    assert chosen["worst"].tolist() == [1, 3, 4]
    assert 2 not in chosen["random"], "it has no labels"
    assert chosen["random"].tolist() == hand_sheets.choose(error, 3, seed=0)["random"].tolist()


# ---- submissions -----------------------------------------------------------------------------------------------------


def submission_samples(keys: list[str]) -> Samples:
    """Joint j of sample s is at (s, j, 500) mm, vertex v at (s, -v, 400) mm."""
    num = len(keys)
    grid = np.zeros((num, 778, 3))
    grid[:, :, 0], grid[:, :, 1] = np.arange(num)[:, None], np.arange(778)
    joint, vert = grid[:, :21] + [0, 0, 500], grid * [1, -1, 1] + [0, 0, 400]
    plain = samples_of(np.ones(num))
    return Samples(**{**vars(plain), "key": np.array(keys, dtype=object), "joint_cam": joint, "vert_cam": vert})


def read_submission(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["pred.json"]
        content = json.loads(archive.read("pred.json"))
    assert json.loads((path.parent / "pred.json").read_text()) == content
    joint, vert = (np.array(part) for part in content)
    return joint, vert


def test_freihand_submission(tmp_path: Path) -> None:
    """Sorted by image number, in metres, OpenPose order, OpenCV's camera."""
    numbers = [2, 0, 1]
    keys = [plain_key("freihand", "evaluation", f"{n:08d}") + "/0" for n in numbers]
    joint, vert = read_submission(write_submission("freihand", submission_samples(keys), tmp_path))
    assert (joint.shape, vert.shape) == ((3, 21, 3), (3, 778, 3))
    for image in range(3):
        row = numbers.index(image)
        np.testing.assert_allclose(joint[image], [[row / 1000, j / 1000, 0.5] for j in range(21)], atol=1e-9)
        np.testing.assert_allclose(vert[image], [[row / 1000, -v / 1000, 0.4] for v in range(778)], atol=1e-9)
    with pytest.raises(ValueError, match="has more than one hand"):
        write_submission("freihand", submission_samples([keys[0], keys[1], keys[0]]), tmp_path)


def test_ho3d_submission(tmp_path: Path) -> None:
    """In the order of evaluation.txt, in metres, MANO's order with tips last, OpenGL's camera; read as we convert."""
    order = ["SM1/0003", "AP10/0001", "SM1/0001"]
    keys = [plain_key("ho3d", "evaluation", *name.split("/")) + "/0" for name in sorted(order)]
    samples = submission_samples(keys)
    joint, vert = read_submission(write_submission("ho3d", samples, tmp_path, order))
    assert (joint.shape, vert.shape) == ((3, 21, 3), (3, 778, 3))
    assert (joint[:, :, 2] < 0).all()
    assert (vert[:, :, 2] < 0).all()
    assert joint[0, 4].tolist() == [0.002, -0.009, -0.5], "its joint 4 is the middle finger's knuckle, our joint 9"
    assert joint[0, 16].tolist() == [0.002, -0.004, -0.5], "its joint 16 is the tip of the thumb, our joint 4"
    assert joint[0, 7].tolist() == [0.002, -0.017, -0.5], "its joint 7 is the pinky's knuckle, our joint 17"
    for image, name in enumerate(order):
        row = sorted(order).index(name)
        np.testing.assert_allclose(joint[image][MANO_21] @ OPENGL_TO_OPENCV * 1000, samples.joint_cam[row], atol=1e-6)
        np.testing.assert_allclose(vert[image] @ OPENGL_TO_OPENCV * 1000, samples.vert_cam[row], atol=1e-6)
    with pytest.raises(ValueError, match="1 of the 4 images of --order have no prediction, the first is AP10_0009"):
        write_submission("ho3d", samples, tmp_path, [*order, "AP10/0009"])


def test_submission_from_the_script(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [str(place / "run"), *overrides(place), "--num_bootstrap=100", "--num_overlay=0"]
    assert main([*base, "--submission=freihand", "DATA.val.max_sample=5", f"--output={tmp_path}/out"]) == 0
    joint, _ = read_submission(tmp_path / "out/pred.zip")
    assert joint.shape == (NUM, 21, 3), "the whole split, sorted by key"
    assert f"it contains {NUM} images" in capsys.readouterr().out
    with (tmp_path / "out/samples.csv").open() as file:
        assert len(list(csv.DictReader(file))) == NUM
    with pytest.raises(SystemExit):
        main([*base, "--submission=ho3d"])
    assert "needs --order" in capsys.readouterr().err


def test_data_without_labels_has_no_tables_but_a_line() -> None:
    groups = [Group("all", "all", 40, {}, {}, {})]
    assert summary_grids(groups) == []
    assert "None of the 40 hands has labels for any metric." in legend(groups, Bootstrap())
