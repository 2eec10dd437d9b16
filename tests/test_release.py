"""script/export.py --to checkpoint: a network released as a folder for git, and everything that reads it."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from script import evaluate, predict
from script import export as script
from src.batch import Batch
from src.checkpoint.folder import find_checkpoint
from src.checkpoint.network import load_network
from src.checkpoint.save import TrainState, network_texts, save_checkpoint
from src.config import ConfigError
from src.export.model_card import BEGIN, END
from src.export.release import portable_config
from src.hand.standin.build import build_standin_hand
from src.model.net import PoseNet
from src.tracking.tracker import METRICS
from src.train.preflight import check_files
from tests.helpers import ROOT, random_batch, small_config
from tests.test_predict import photograph
from tests.test_predict_script import save as save_photo
from tests.test_training import stage1

FILES = ["README.md", "backbone.json", "config.yaml", "manifest.json", "model.safetensors", "state.json"]
SECRETS = ("somebody", "scratch", "10.0.0.7")
MACHINE = (
    "DATA.root=/home/somebody/shards",
    "DATA.demo=null",
    "DATA.index_dir=/scratch/index",
    "DATA.train.source=[/home/somebody/shards/A/train/*, B/train/*]",
    "DATA.val.source=[/mnt/somebody/disk/B/val/*]",
    "GENERAL.output_root=/scratch/runs",
    "GENERAL.resume_path=/scratch/runs/x",
    "MODEL.init_from=/scratch/runs/y",
    "AIM.repo=/scratch/aim",
    "AIM.server_url=aim://10.0.0.7:53800",
)


def make_run(run: Path, *overrides: str) -> PoseNet:
    """A run folder with a journal and one checkpoint of a small network with random weights."""
    cfg = small_config(*MACHINE, *overrides)
    torch.manual_seed(7)
    net = PoseNet(cfg.MODEL, build_standin_hand())
    run.mkdir(parents=True)
    row = {"step": 7, "subset": "val", "mpjpe_cam": 87.34, "mpjpe_rel": 77.97, "mpjpe_rel_mean_hand": 96.2}
    (run / METRICS).write_text(json.dumps(row) + "\n")
    state = TrainState(step=7, config_name="stage1-demo", extra={"health": {"bad": "/scratch/shard.tar"}})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    save_checkpoint(run, model=net, optimizer=optimizer, state=state, texts=network_texts(cfg, net))
    return net.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a fresh clone's: a run, and the network released from it."""
    folder = tmp_path_factory.mktemp("clone")
    make_run(folder / "run")
    assert release(folder / "run", folder / "model/hand-mini") == script.DONE
    return folder


@pytest.fixture
def released(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return Path("model/hand-mini")


def release(run: Path, folder: Path, *options: str) -> int:
    """Random weights are more sensitive to rounding than trained ones, hence the tolerance."""
    arguments = [str(run), "--to", "checkpoint", "--precision", "fp16", "--output", str(folder), "--tolerance", "3"]
    return script.main([*arguments, *options])


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@torch.no_grad()
def joints(net: PoseNet, batch: Batch) -> np.ndarray:
    return net(batch).joint_cam.numpy()


def test_written_files(released: Path) -> None:
    assert sorted(p.name for p in released.iterdir()) == FILES
    assert json.loads((released / "manifest.json").read_text()).keys() == {*FILES} - {"README.md", "manifest.json"}
    with safe_open(released / "model.safetensors", "pt") as file:
        dtype = {name: (file.get_tensor(name).dtype, file.get_tensor(name).ndim) for name in file.keys()}  # noqa: SIM118
    assert set(dtype.values()) == {(torch.float16, n) for n in (2, 3, 4)} | {(torch.float32, 1)}
    whole = next(released.parents[1].glob("run/checkpoints/*/model.safetensors"))
    assert (released / "model.safetensors").stat().st_size < 0.55 * whole.stat().st_size
    assert (released / "model.safetensors").stat().st_mode == (released / "state.json").stat().st_mode


def test_no_paths_of_the_training_machine(released: Path, place: Path) -> None:
    for name in set(FILES) - {"model.safetensors"}:
        text = (released / name).read_text()
        assert not [word for word in (*SECRETS, str(place)) if word in text], name
    assert not re.search(r"(?m)[:\-] /", (released / "config.yaml").read_text())


def test_portable_config() -> None:
    tree = {
        "GENERAL": {"output_root": "/x", "resume_path": "/x", "description": "a/b"},
        "DATA": {
            "root": "/data/x",
            "demo": None,
            "train": {"source": {"a": {"source": ["/data/x/A/*", "B/{0..9}.tar"], "weight": 2.0}}},
            "val": {"source": ["/mnt/y/C/val/*"]},
        },
        "MODEL": {"hand_model": "/home/me/MANO_RIGHT.pkl", "backbone": {"backbone_str": "~/dinov2-large"}},
    }
    assert portable_config(tree) == {
        "GENERAL": {"output_root": "checkpoint", "resume_path": None, "description": "a/b"},
        "DATA": {
            "root": "data",
            "demo": None,
            "train": {"source": {"a": {"source": ["A/*", "B/{0..9}.tar"], "weight": 2.0}}},
            "val": {"source": ["C/val/*"]},
        },
        "MODEL": {"hand_model": "model/mano/MANO_RIGHT.pkl", "backbone": {"backbone_str": "dinov2-large"}},
    }
    demo = {"DATA": {"root": "/tmp/demo", "demo": {"seed": 0}}}
    assert portable_config(demo)["DATA"]["root"] == "data/demo"
    relative = {"DATA": {"root": "../shared", "demo": None, "val": {"source": ["realhands/*"]}}}
    assert portable_config(relative) == relative


def test_the_same_predictions(released: Path) -> None:
    """Up to fp16 rounding. The demo network after 700 steps: 0.02 mm on average, 0.3 mm at most on validation."""
    loaded = load_network("model/hand-mini")
    net, whole = loaded.network, load_network("run").network
    assert loaded.step == 7
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    distance = np.linalg.norm(joints(net, batch := random_batch(8, 56)) - joints(whole, batch), axis=-1)
    assert 0 < distance.max() < 1.0, "0.34 mm with these random weights"
    assert distance.mean() < 0.2, "0.08 mm"


def test_fp32_is_the_same_network(released: Path, tmp_path: Path) -> None:
    assert script.main(["run", "--to", "checkpoint", "--output", str(tmp_path / "net")]) == script.DONE
    net, whole = load_network(tmp_path / "net").network, load_network("run").network
    batch = random_batch(2, 56)
    assert np.array_equal(joints(net, batch), joints(whole, batch))


def test_scripts_read_it_unchanged(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prediction, evaluation and export write nothing into the folder."""
    before = digest(released)
    photo = save_photo(tmp_path / "a.png", photograph(1))
    assert predict.main([str(released), str(photo), "--output", str(tmp_path / "out")]) == predict.DONE
    assert json.loads((tmp_path / "out/a.json").read_text())["step"] == 7
    demo = "DATA.demo={train_sample: 1, val_sample: 4, img_size: 64, seed: 0, free_rotation: 0.0}"
    data = [f"DATA.root={tmp_path}/shards", "DATA.val.source=[val/*]", demo]
    for name in ("step-7", "step-7-2"):
        assert evaluate.main([str(released), *data, "--num_bootstrap=100", "--num_overlay=0"]) == 0
        assert Path(f"checkpoint/evaluation/hand-mini/{name}/result.json").is_file()
    again = [str(released), "--to", "torch_export", "--output", str(tmp_path / "exported")]
    assert script.main(again) == script.DONE
    assert script.main([*again[:1], "--to", "checkpoint", "--output", str(released)]) == script.WRONG_ARGUMENTS
    assert digest(released) == before


def test_a_new_run_starts_from_it(released: Path, place: Path) -> None:
    one_step = [f"GENERAL.{name}=1" for name in ("total_step", "checkpoint_step", "warmup_step")]
    init = f"MODEL.init_from={place / released}"
    run = stage1(place, "runs", *one_step, "MODEL.handec.num_layer=2", "MODEL.backbone.num_layer=2", init)
    assert re.search(r"\d+ tensors loaded\n", (run / "log.txt").read_text()), "nothing is missing or unexpected"


def test_resuming_is_refused(released: Path) -> None:
    with pytest.raises(ConfigError, match=r"without its optimizer state.*MODEL\.init_from=model/hand-mini"):
        check_files(small_config(f"GENERAL.resume_path={released}"))
    with pytest.raises(ValueError, match=r"cannot be resumed from it.*MODEL\.init_from=model/hand-mini"):
        find_checkpoint(released)


def test_corruption_is_detected(released: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.yaml"):
        copy = tmp_path / name.split(".")[0]
        subprocess.run(["cp", "-r", released, copy], check=True)
        data = bytearray((copy / name).read_bytes())
        data[-3] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} is corrupt: its sha256"):
            load_network(copy)


def test_the_card_keeps_what_was_written_by_hand(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (released / "README.md").read_text()
    for fact in ("| step | 7 |", "`stage1-demo`", "matrices float16", "| `mpjpe_rel` | 78.0 | 96.2 |", "Apache-2.0"):
        assert fact in text
    folder, card = tmp_path / "hand-mini", tmp_path / "hand-mini/README.md"
    assert release(Path("run"), folder) == script.DONE
    card.write_text(text.replace("| step | 7 |", "| step | 6 |").replace("TODO", "Done by hand") + "\nMy figure.\n")
    (folder / "figure.jpg").write_bytes(b"mine")
    assert release(Path("run"), folder) == script.WRONG_ARGUMENTS
    assert "choose --overwrite" in capsys.readouterr().err
    assert release(Path("run"), folder, "--overwrite") == script.DONE
    assert card.read_text() == text.replace("TODO", "Done by hand") + "\nMy figure.\n"
    assert (folder / "figure.jpg").read_bytes() == b"mine"
    card.write_text("A card of my own.")
    before = digest(folder)
    assert release(Path("run"), folder, "--overwrite") == script.WRONG_ARGUMENTS
    assert f"put the lines {BEGIN} and {END}" in capsys.readouterr().err
    assert digest(folder) == before


def test_a_release_that_differs_is_not_kept(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert release(Path("run"), tmp_path / "net", "--tolerance", "1e-6") == script.DIFFERS
    assert "the fp16 checkpoint differs from the network" in capsys.readouterr().err
    net = load_network("run").network
    with torch.no_grad():
        net.decoder.layers[0].self_norm.weight[0] = 1e5  # a vector: kept in float32
        net.pose_head.weight[0, 0, 0] = 1e5
    from src.export.release import cast_weights

    with pytest.raises(ValueError, match=r"pose_head\.weight holds a weight of 1e\+05, too large"):
        cast_weights(net, torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "torch_export", "--precision", "fp16"], "--precision belongs to --to checkpoint"),
        (["--to", "checkpoint", "torch_export"], "a folder of its own"),
    ],
)
def test_options_that_exclude_each_other(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["run", *options])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_does_not_ignore_it() -> None:
    def is_ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0

    for folder in ("mini", "hand-mini"):
        assert not [name for name in FILES if is_ignored(f"model/{folder}/{name}")]
    assert is_ignored("model/mano/MANO_RIGHT.pkl")
    assert is_ignored("model/facebook/dinov2-large/model.safetensors")


def test_the_backbone_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Hugging Face folder with the trained weights that a new run starts from; an existing one is kept."""
    output = place / "model/own-backbone"
    command = [str(place / "run"), "--to", "backbone", "--output", str(output)]
    assert script.main(command) == script.DONE
    assert {"config.json", "model.safetensors"} <= {file.name for file in output.iterdir()}
    cfg = small_config("MODEL.backbone.random_init=false", f"MODEL.backbone.backbone_str={output}")
    trained = load_network(place / "run").network
    image = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    fresh = PoseNet(cfg.MODEL, build_standin_hand())
    assert torch.allclose(fresh.backbone(image), trained.backbone(image), atol=1e-5)
    assert script.main(command) == script.WRONG_ARGUMENTS
    assert "exists; choose --overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.parse_arguments([str(place / "run"), "--to", "backbone", "onnx"])
