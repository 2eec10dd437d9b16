"""Exported networks give the outputs of the network, for any batch size, or are not kept."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from script import export as script
from src.checkpoint.network import LoadedNetwork, load_network
from src.export.onnx import ABOUT, INPUTS, OUTPUTS, ExportError, PatchNetwork, example_inputs, export, staged
from src.model.net import PoseNet
from tests.helpers import ROOT
from tests.test_predict import make_run

HAS_ONNX = all(importlib.util.find_spec(name) for name in script.NEEDS["onnx"])


@dataclass
class Made:
    """The result of one call of the script for a small network; with both files if ONNX is installed."""

    run: Path
    folder: Path
    loaded: LoadedNetwork
    code: int
    said: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    run, folder = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("export") / "out"
    make_run(run, "MODEL.backbone.num_layer=1", "MODEL.handec.num_layer=1")
    said = io.StringIO()
    with redirect_stdout(said):
        code = script.main([str(run), "--to", "torch_export", *["onnx"] * HAS_ONNX, "--output", str(folder)])
    return Made(run, folder, load_network(run), code, said.getvalue())


@torch.no_grad()
def expected(net: PoseNet, batch: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    return [value.numpy() for value in PatchNetwork(net)(*batch)]


def test_script_reports_the_differences(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert made.code == script.DONE
    assert all(made.said.count(name) >= 1 + HAS_ONNX for name in OUTPUTS)
    assert sorted(p.name for p in made.folder.iterdir()) == ["posenet.onnx"] * HAS_ONNX + ["posenet.pt2"]
    arguments = ["--to", "torch_export", "--output", str(made.folder)]
    assert script.main([str(made.run), *arguments]) == script.WRONG_ARGUMENTS
    assert "posenet.pt2 exists; choose --overwrite" in capsys.readouterr().err
    assert script.main([str(made.run / "nothing"), *arguments, "--overwrite"]) == script.WRONG_ARGUMENTS
    assert "there is no such folder" in capsys.readouterr().err


def test_torch_export(made: Made) -> None:
    """Read back and run on a batch size that was neither traced nor checked."""
    extra, net = {ABOUT: ""}, made.loaded.network
    program = torch.export.load(made.folder / "posenet.pt2", extra_files=extra)
    about = json.loads(extra[ABOUT])
    assert about["img_size"] == net.img_size
    assert about["expansion_ratio"] == made.loaded.crop
    assert about["inputs"].keys() == INPUTS.keys()
    batch = example_inputs(net, 5)
    for name, found, value in zip(OUTPUTS, program.module()(*batch), expected(net, batch), strict=True):
        assert np.allclose(found.detach().numpy(), value, atol=1e-3), name


@pytest.mark.skipif(not HAS_ONNX, reason="ONNX is an optional extra: pip install -e '.[export]'")
def test_onnx(made: Made) -> None:
    """The same in onnxruntime, with named inputs and outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(made.folder / "posenet.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(INPUTS)
    batch = example_inputs(made.loaded.network, 5)
    found = session.run(list(OUTPUTS), dict(zip(INPUTS, (value.numpy() for value in batch))))
    for name, value, wanted in zip(OUTPUTS, found, expected(made.loaded.network, batch), strict=True):
        assert np.allclose(value, wanted, atol=1e-3), name
    assert json.loads(session.get_modelmeta().custom_metadata_map[ABOUT])["hand_model"] == "standin"


def test_a_file_that_differs_is_not_kept(made: Made, tmp_path: Path) -> None:
    """The graph of one network compared with another one's weights, as if the exporter had a bug."""
    program = torch.export.load(made.folder / "posenet.pt2")
    other = load_network(made.run)
    with torch.no_grad():
        other.network.root_head.linear.bias += 0.01
    file = tmp_path / "net.pt2"
    file.write_text("an earlier export")
    with pytest.raises(ExportError, match=r"root_cam by .* \(allowed 0\.01\).*not kept"):
        export(other, program, "torch_export", file, 0.01)
    assert file.read_text() == "an earlier export"
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]


def test_an_export_into_a_checkpoint_keeps_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    with staged(tmp_path) as place:
        (place / "posenet.onnx").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "posenet.onnx"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys; sys.argv = ['export.py', '--help']\n"
        "try: runpy.run_path('script/export.py', run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers', 'onnx'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--tolerance" in done.stdout
