"""Release a trained network as a folder small enough for git: `script/export.py --to checkpoint`.

    model/hand-mini/
        model.safetensors   weights; with fp16 the matrices are float16, biases and norms stay float32
        config.yaml         the run's configuration without paths and addresses of the training machine
        backbone.json       shape of the backbone
        state.json          step and configuration name
        manifest.json       size and sha256 of the files above
        README.md           the model card (src/export/model_card.py); not in the manifest, so that it can be edited

Everything that reads a checkpoint reads this folder; only resuming needs the optimizer state. Loading casts the weights
to float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from src.checkpoint.folder import BACKBONE, CONFIG, MODEL, STATE, write_manifest
from src.checkpoint.network import LoadedNetwork, load_network
from src.checkpoint.save import read_state
from src.export.model_card import CARD, read_card, write_card
from src.export.onnx import Difference, ExportError, PatchNetwork, compare, example_inputs, staged
from src.model.backbone import Backbone

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
# Keys that describe the training machine, and their values in a released configuration.
_MACHINE_KEYS: dict[str, Any] = {
    "GENERAL.output_root": "checkpoint",
    "GENERAL.resume_path": None,
    "DATA.index_dir": None,
    "MODEL.init_from": None,
    "AIM.server_url": None,
    "AIM.repo": "checkpoint",
}
_DATA_ROOT, _DEMO_ROOT = "data", "data/demo"  # replace an absolute DATA.root
_KEPT_PARTS = 3  # of an absolute shard pattern outside DATA.root


def release(loaded: LoadedNetwork, folder: Path, precision: str, tolerance: float) -> list[Difference]:
    """Write a network to `folder`, load it from there and compare it with the original.

    An existing `folder` keeps its other files, and its model card keeps what was written by hand.

    Args:
        precision: a key of PRECISIONS.
        tolerance: mm and px, a hundredth of it for rotations and shape.

    Raises:
        ExportError: an output differs by more than the tolerance; `folder` is then unchanged.
        ValueError: a weight overflows the precision, or the existing card lacks the markers of its facts; likewise.
    """
    card = read_card(folder / CARD)
    with staged(folder) as temporary, torch.no_grad():
        _write_network(loaded, temporary, precision)
        released = load_network(temporary, loaded.hand, loaded.network.centre.device)
        module = PatchNetwork(released.network).eval()

        def run(batch: Sequence[torch.Tensor]) -> list[np.ndarray]:
            return [value.cpu().numpy() for value in module(*batch)]

        differences = compare(loaded.network, run, tolerance, f"the {precision} checkpoint")
    write_card(folder, card, loaded, precision)
    return differences


def release_backbone(loaded: LoadedNetwork, folder: Path) -> None:
    """Write the backbone to `folder` in the format of transformers (config.json, model.safetensors) and read it back.

    Raises ExportError if the tokens of the saved backbone differ; `folder` is then unchanged.
    """
    net = loaded.network
    with staged(folder) as temporary, torch.no_grad():
        net.backbone.model.save_pretrained(temporary)
        image = example_inputs(net, 2)[0].float() / 255.0
        own = replace(loaded.model_config.backbone, backbone_str=str(temporary), random_init=False)
        tokens = Backbone(own, net.img_size).eval().to(image.device)(image)
        largest = (tokens - net.backbone(image)).abs().max().item()
        if not largest < 1e-3:
            raise ExportError(f"the tokens of the saved backbone differ by {largest:.3g}; it was not kept")


def _write_network(loaded: LoadedNetwork, folder: Path, precision: str) -> None:
    save_file(cast_weights(loaded.network, PRECISIONS[precision]), folder / MODEL, metadata={"format": "pt"})
    state = {"step": loaded.step, "config_name": read_state(loaded.folder).config_name}
    texts = {
        CONFIG: OmegaConf.to_yaml(OmegaConf.create(portable_config(loaded.configuration))),
        BACKBONE: json.dumps(loaded.network.backbone.shape(), indent=1) + "\n",
        STATE: json.dumps(state, indent=1) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / MODEL).chmod((folder / STATE).stat().st_mode)  # safetensors makes it readable by owner only
    write_manifest(folder)


def cast_weights(net: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state of `net` with its weight matrices in `dtype`.

    Vectors (biases, norms, layer scales) and buffers stay float32: they take less than a hundredth of the space.
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


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run without the paths and addresses of its machine; relative paths are kept.

    An absolute `DATA.root` becomes `data`, and shard patterns below it become relative to it.
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
    """The replacement of an absolute path."""
    if key.startswith("DATA.") and Path(path).is_relative_to(root):
        return str(Path(path).relative_to(root))
    if key.startswith("DATA."):
        return "/".join(Path(path).parts[-_KEPT_PARTS:])
    if key == "MODEL.hand_model":
        return f"model/mano/{Path(path).name}"
    return Path(path).name
