"""A trained network from its checkpoint: configuration, shape and weights, all read from the checkpoint folder itself.

Older checkpoints hold no configuration; theirs is read from the run folder above them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from src.checkpoint.folder import BACKBONE, CONFIG, MODEL, NETWORK_FILES, find_checkpoint, read_step
from src.config import ModelConfig
from src.hand.load import load_hand
from src.hand.skeleton import HandArrays


@dataclass(frozen=True)
class SavedNetwork:
    """What a checkpoint tells about its network, verified; the weights are still on the disk."""

    folder: Path
    step: int  # optimizer steps done
    config: dict[str, Any]  # the whole run's, as config.yaml has it: plain dicts, lists and values
    model: ModelConfig  # its MODEL section
    backbone_shape: dict[str, Any]  # what Backbone.shape() gave

    @property
    def expansion_ratio(self) -> float:
        """Patch side over hand box side that the network was trained with."""
        return float(self.config["TRAIN"]["expansion_ratio"])


def read_checkpoint(path: str | Path) -> SavedNetwork:
    """Verify the checkpoint at `path` (a run folder means its newest one) and read its configuration.

    Raises:
        ValueError: naming the file that is missing, damaged or of another version of this program.
    """
    path = Path(path)
    if path.name == "best" and not path.exists() and (path.parent / "checkpoints").is_dir():
        path = path.parent / "checkpoints" / "best"
    folder = find_checkpoint(path, NETWORK_FILES)
    file = folder / CONFIG
    if not file.is_file():
        file = folder.parent.parent / CONFIG
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no {CONFIG} and there is none at {file}: give the checkpoint in its run folder"
        )
    try:
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
        model = _model_section(config["MODEL"])
        shape = _backbone_shape(folder, model)
        float(config["TRAIN"]["expansion_ratio"])
    except (OSError, ValueError, KeyError, TypeError, OmegaConfBaseException) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ValueError(f"{file} does not describe a network of this version: {reason}") from error
    return SavedNetwork(folder, read_step(folder), config, model, shape)


def _model_section(tree: Mapping[str, Any]) -> ModelConfig:
    """The MODEL section, typed. The other sections may be of another version: the network does not depend on them."""
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), dict(tree))
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ValueError(f"MODEL.{missing[0]} is missing")
    return OmegaConf.to_object(merged)


def _backbone_shape(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """The backbone's shape from the checkpoint; else from the folder its weights came from, else from the config."""
    backbone = model.backbone
    for file in (folder / BACKBONE, Path(backbone.backbone_str) / "config.json"):
        if file.is_file() and (file.name == BACKBONE or not backbone.random_init):
            return json.loads(file.read_text(encoding="utf-8"))
    return {
        "hidden_size": backbone.hidden_size,
        "num_hidden_layers": backbone.num_layer,
        "num_attention_heads": backbone.num_head,
        "patch_size": backbone.patch_size,
        "use_swiglu_ffn": backbone.swiglu,
    }


def choose_hand(saved: SavedNetwork, hand_model: str | Path | HandArrays | None) -> HandArrays:
    """The hand the network was trained with, or another file (or arrays) of the same kind.

    Raises ValueError where there is none: MANO's arrays may not be passed on, so no checkpoint holds them.
    """
    trained_with = saved.model.hand_model
    if isinstance(hand_model, HandArrays):
        hand = hand_model
    else:
        name = trained_with if hand_model is None else str(hand_model)
        if name != "standin" and not Path(name).is_file():
            raise ValueError(
                f"hand model {name}: there is no such file; say where MANO_RIGHT.pkl lies (hand_model=...)"
            )
        hand = load_hand(name)
    if (trained_with == "standin") != (hand.name == "standin"):
        raise ValueError(
            f"{saved.folder} was trained with the hand {trained_with!r}, and {hand.name!r} was given: pose and shape "
            f"of one mean nothing to the other"
        )
    return hand


def load_weights_into(net: nn.Module, saved: SavedNetwork) -> None:
    """Fill the network. Raises ValueError where a weight is missing, unknown or of another shape."""
    try:
        load_model(net, str(saved.folder / MODEL))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{saved.folder / MODEL} does not fit this version of the network: {error}") from error
