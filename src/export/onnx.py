"""Export a trained network to one file for other programs, `torch.export` (.pt2) or ONNX, and compare their outputs.

Inputs and outputs are those of `PoseNet.predict_patch`; INPUTS and OUTPUTS below name them. Cutting the patch and
rotating hands back (src/predict/predictor.py) are left to the caller; the file contains what that needs, see `about`.
Shape legend: batch is dynamic; S patch side, V vertices of the hand model.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from src.checkpoint.folder import MANIFEST
from src.checkpoint.network import LoadedNetwork
from src.model.net import PoseNet

INPUTS = {
    "patch": "uint8 [batch, 3, S, S] RGB, right hands (mirror left ones)",
    "focal": "float32 [batch, 2] px, of the patch camera",
    "princpt": "float32 [batch, 2] px, of the patch camera",
}
# name -> (meaning, allowed difference relative to --tolerance)
OUTPUTS = {
    "mano_rotmat": ("[batch, 16, 3, 3] rotations against the parent joint, root first, flat_hand_mean=True", 0.01),
    "mano_pose": ("[batch, 48] the same as axis-angle, rad", 0.01),
    "mano_shape": ("[batch, 10]", 0.01),
    "root_cam": ("[batch, 3] mm, wrist in the patch camera", 1.0),
    "joint_cam": ("[batch, 21, 3] mm, patch camera", 1.0),
    "vert_cam": ("[batch, V, 3] mm, patch camera", 1.0),
    "joint_patch": ("[batch, 21, 2] px of the patch", 1.0),
    "joint_seen": ("[batch, 21, 2] px of the patch, located before any 3D", 1.0),
}
ABOUT = "about.json"  # name of the description inside a .pt2; key of the metadata in ONNX
_TRACED_BATCH, _CHECKED_BATCHES = 2, (1, 3)
_OPSET = 18

Run = Callable[[Sequence[torch.Tensor]], list[np.ndarray]]


class PatchNetwork(nn.Module):
    """`predict_patch`, returning a tuple of tensors in the order of OUTPUTS."""

    def __init__(self, net: PoseNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, patch: torch.Tensor, focal: torch.Tensor, princpt: torch.Tensor) -> tuple[torch.Tensor, ...]:
        prediction = self.net.predict_patch(patch, focal, princpt)
        return tuple(getattr(prediction, name) for name in OUTPUTS)


class Difference(NamedTuple):
    """How far an exported output differs from the network's own."""

    name: str
    largest: float  # absolute, over all batches
    allowed: float


class ExportError(RuntimeError):
    """The exported network computes something else than the original; it was not kept."""


def trace(net: PoseNet) -> torch.export.ExportedProgram:
    """The network as a graph with a dynamic batch size; both kinds of files are written from it."""
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=65536)
        shapes = {name: {0: batch} for name in INPUTS}
        return torch.export.export(PatchNetwork(net).eval(), example_inputs(net, _TRACED_BATCH), dynamic_shapes=shapes)


def export(
    loaded: LoadedNetwork, program: torch.export.ExportedProgram, kind: str, file: Path, tolerance: float
) -> list[Difference]:
    """Write `program`, the traced network, to `file`, read it back and compare it with the network.

    Args: kind: `torch_export` or `onnx`; tolerance: mm and px, a hundredth of it for rotations and shape.
    Raises ExportError if an output differs by more than the tolerance; `file` is then unchanged.
    """
    save, load = {"torch_export": (_save_torch, _load_torch), "onnx": (_save_onnx, _load_onnx)}[kind]
    with staged(file.parent) as folder, torch.no_grad():  # ONNX above 2 GB comes in two files
        save(program, folder / file.name, json.dumps(about(loaded), indent=1))
        return compare(loaded.network, load(folder / file.name), tolerance, f"the {kind} file")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files replace those in `folder` at the end, a manifest last; after an error none do."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder if folder.is_dir() else folder.parent  # on the same disk
    with tempfile.TemporaryDirectory(dir=beside, prefix=".export-") as place:
        yield Path(place)
        folder.mkdir(exist_ok=True)
        if (Path(place) / MANIFEST).exists():  # a checkpoint is incomplete until its new manifest is in place
            (folder / MANIFEST).unlink(missing_ok=True)
        for file in sorted(Path(place).iterdir(), key=lambda file: file.name == MANIFEST):
            os.replace(file, folder / file.name)


def about(loaded: LoadedNetwork) -> dict[str, Any]:
    """The description of the network inside the exported file."""
    return {
        "inputs": INPUTS,
        "outputs": {name: text for name, (text, _) in OUTPUTS.items()},
        "img_size": loaded.network.img_size,
        "expansion_ratio": loaded.crop,
        "hand_model": loaded.network.hand.name,
        "checkpoint": str(loaded.folder),
        "step": loaded.step,
    }


def example_inputs(net: PoseNet, num: int) -> tuple[torch.Tensor, ...]:
    """Noise patches and random patch cameras; the same for the same `num`."""
    rng, side = torch.Generator().manual_seed(num), net.img_size
    patch = torch.randint(0, 256, (num, 3, side, side), generator=rng, dtype=torch.uint8)
    focal = side * (1.0 + 4.0 * torch.rand(num, 1, generator=rng)).expand(-1, 2).contiguous()
    princpt = side * torch.rand(num, 2, generator=rng)
    return tuple(value.to(net.centre.device) for value in (patch, focal, princpt))


def compare(net: PoseNet, exported: Run, tolerance: float, what: str) -> list[Difference]:
    """The largest difference of each output over a few batches of noise.

    Raises ExportError naming `what` was exported if one is above `tolerance` (see `export`).
    """
    module, largest = PatchNetwork(net).eval(), np.zeros(len(OUTPUTS))
    for batch in (example_inputs(net, num) for num in _CHECKED_BATCHES):
        expected = [value.cpu().numpy() for value in module(*batch)]
        found = exported(batch)
        assert [value.shape for value in found] == [value.shape for value in expected]
        largest = np.maximum(largest, [np.abs(a - b).max() for a, b in zip(found, expected, strict=True)])
    allowed = [tolerance * share for _, share in OUTPUTS.values()]
    differences = [Difference(*item) for item in zip(OUTPUTS, largest.tolist(), allowed, strict=True)]
    far = [d for d in differences if not d.largest <= d.allowed]  # NaN, too
    if texts := [f"{d.name} by {d.largest:.3g} (allowed {d.allowed:.3g})" for d in far]:
        raise ExportError(f"{what} differs from the network: {', '.join(texts)}; not kept (see --tolerance)")
    return differences


def _save_torch(program: torch.export.ExportedProgram, file: Path, description: str) -> None:
    torch.export.save(program, file, extra_files={ABOUT: description})


def _load_torch(file: Path) -> Run:
    module = torch.export.load(file).module()
    return lambda batch: [value.cpu().numpy() for value in module(*batch)]


def _save_onnx(program: torch.export.ExportedProgram, file: Path, description: str) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about a missing torchvision
    names = {"input_names": list(INPUTS), "output_names": list(OUTPUTS)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's FutureWarnings about its own code
        exported = torch.onnx.export(program, dynamo=True, opset_version=_OPSET, verbose=False, **names)
    exported.model.metadata_props[ABOUT] = description
    exported.save(file)


def _load_onnx(file: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    assert [value.name for value in session.get_outputs()] == list(OUTPUTS)
    assert session.get_modelmeta().custom_metadata_map[ABOUT]
    return lambda batch: session.run(None, dict(zip(names, (value.cpu().numpy() for value in batch), strict=True)))
