"""A trained network as a folder small enough for git: what `script/export.py --to checkpoint` writes.

    model/hand-mini/
        model.safetensors   weights; with fp16 the matrices are float16, biases and norms stay float32
        config.yaml         the run's configuration without the training machine's paths and addresses
        backbone.json       shape of the backbone
        state.json          step and configuration name
        manifest.json       size and sha256 of the files above
        README.md           the model card (src/export/model_card.py); not in the manifest, so that it can be edited

Everything that reads a checkpoint reads this folder, except resuming, which needs the optimizer state. Loading casts
the weights to float32.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from src.checkpoint.checkpoint_files import write_manifest
from src.checkpoint.folder import BACKBONE, CONFIG, MANIFEST, MODEL, STATE, read_config_name
from src.export.model_card import CARD, read_card, write_card
from src.export.onnx import Difference, ExportError, PatchNetwork, Run, compare, describe_far, example_inputs
from src.model.backbone import Backbone
from src.model.net import PoseNet

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
# Keys that say where a run was made, and what a shipped configuration has instead.
_MACHINE_KEYS: dict[str, Any] = {
    "GENERAL.output_root": "checkpoint",
    "GENERAL.resume_path": None,
    "DATA.index_dir": None,
    "MODEL.init_from": None,
    "AIM.server_url": None,
    "AIM.repo": "checkpoint",
}
_DATA_ROOT, _DEMO_ROOT = "data", "data/demo"  # in place of an absolute DATA.root
_KEPT_PARTS = 3  # of an absolute shard pattern outside of DATA.root
_CHECKED_BATCHES = (1, 3)


def release(
    net: PoseNet, folder: Path, precision: str, tolerance: float, hand_model: str | None = None
) -> list[Difference]:
    """Write the network of a checkpoint to `folder`, load it from there and compare it with `net`.

    An existing `folder` keeps its other files, and of its model card all that was written by hand. `hand_model`: as it
    was given to `PoseNet.from_checkpoint`.

    Raises ExportError where an output differs by more than `tolerance` mm or px (a hundredth of it for rotations and
    shape), ValueError where a weight overflows the precision or the existing card has no place for the facts; `folder`
    is then as it was before.
    """
    assert net.saved is not None, "release a network that came from a checkpoint"
    card = read_card(folder / CARD)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place, torch.no_grad():
        temporary = Path(place)
        _write_network(net, temporary, precision)
        batches = [example_inputs(net, num) for num in _CHECKED_BATCHES]
        differences = compare(PatchNetwork(net).eval(), _load(temporary, net, hand_model), batches, tolerance)
        if far := [d for d in differences if not d.is_within]:
            problem = f"the {precision} checkpoint differs from the network: {describe_far(far)}"
            raise ExportError(f"{problem}; it was not kept, --tolerance allows more")
        folder.mkdir(exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # until the new one is in place the folder is incomplete
        for file in (*(temporary / each for each in (MODEL, CONFIG, BACKBONE, STATE)), temporary / MANIFEST):
            os.replace(file, folder / file.name)
    write_card(folder, card, net, precision)
    return differences


def release_backbone(net: PoseNet, folder: Path) -> None:
    """Write the backbone to `folder` as transformers does (config.json, model.safetensors) and read it back.

    Raises ExportError where what was read computes other tokens; `folder` is then as it was before.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        net.backbone.model.save_pretrained(place)
        _check_backbone(net, Path(place))
        folder.mkdir(exist_ok=True)
        for file in Path(place).iterdir():  # large weights come in several
            os.replace(file, folder / file.name)


def _check_backbone(net: PoseNet, folder: Path) -> None:
    """Raises ExportError where the backbone in `folder` computes other tokens than that of `net`."""
    patch, *_ = example_inputs(net, 2)
    image = patch.float() / 255.0
    own = replace(net.saved.model.backbone, backbone_str=str(folder), random_init=False)
    with torch.no_grad():
        tokens = Backbone(own, net.img_size).eval().to(image.device)(image)
        largest = (tokens - net.backbone(image)).abs().max().item()
    if not largest < 1e-3:
        raise ExportError(f"the saved backbone computes tokens that differ by {largest:.3g}; it was not kept")


def _write_network(net: PoseNet, folder: Path, precision: str) -> None:
    saved = net.saved
    save_file(cast_weights(net, PRECISIONS[precision]), folder / MODEL, metadata={"format": "pt"})
    state = {"step": saved.step, "config_name": read_config_name(saved.folder)}
    texts = {
        CONFIG: OmegaConf.to_yaml(OmegaConf.create(portable_config(saved.config))),
        BACKBONE: json.dumps(net.backbone.shape(), indent=1) + "\n",
        STATE: json.dumps(state, indent=1) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / MODEL).chmod((folder / STATE).stat().st_mode)  # safetensors writes for the owner alone
    write_manifest(folder)


def cast_weights(net: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state of `net` with its weight matrices in `dtype`. Vectors (biases, norms, layer scales) and buffers stay as
    they are: in float32 they take less than a hundredth of the space.

    Raises ValueError naming a weight that overflows `dtype`.
    """
    matrices = {name for name, value in net.named_parameters(remove_duplicate=False) if value.ndim >= 2}
    state = {}
    for name, value in net.state_dict().items():
        cast = value.to("cpu", dtype) if name in matrices else value.cpu()
        if not torch.isfinite(cast).all() and torch.isfinite(value).all():
            raise ValueError(f"{name} holds a weight of {value.abs().max():.3g}, too large for {dtype}; use fp32")
        state[name] = cast.contiguous()
    return state


def _load(folder: Path, like: PoseNet, hand_model: str | None) -> Run:
    """The network that was written, as `compare` calls it; with the hand model and on the device of `like`."""
    net = PoseNet.from_checkpoint(folder, hand_model or like.saved.model.hand_model, like.centre.device)
    module = PatchNetwork(net).eval()
    return lambda batch: [value.cpu().numpy() for value in module(*batch)]


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run without what is true on its machine alone; relative paths are kept.

    `DATA.root`: an absolute one becomes `data`, and shard patterns below it become relative to it.
    """
    root = str(config["DATA"]["root"])
    root_here = _DATA_ROOT if config["DATA"].get("demo") is None else _DEMO_ROOT

    def cleaned(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: cleaned(f"{key}.{name}" if key else str(name), below) for name, below in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [cleaned(key, item) for item in value]
        if key in _MACHINE_KEYS:
            return _MACHINE_KEYS[key]
        if not (isinstance(value, str) and _is_absolute(value)):
            return value
        return root_here if key == "DATA.root" else _portable_path(key, value, root)

    return cleaned("", config)


def _is_absolute(path: str) -> bool:
    return path.startswith(("/", "~", "\\")) or path[1:3] in (":\\", ":/")


def _portable_path(key: str, path: str, root: str) -> str:
    """What replaces an absolute path."""
    if key.startswith("DATA.") and Path(path).is_relative_to(root):
        return str(Path(path).relative_to(root))
    if key.startswith("DATA."):
        return "/".join(Path(path).parts[-_KEPT_PARTS:])
    if key == "MODEL.hand_model":
        return f"model/mano/{Path(path).name}"
    return Path(path).name
