"""A network from its checkpoint: `load_network` builds and fills a trained one, `init_from` starts a new one.

Everything is read from the checkpoint folder itself: configuration, backbone shape, weights. Older checkpoints hold no
configuration; theirs is read from the run folder above them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from src.checkpoint.folder import BACKBONE, CONFIG, MODEL, NETWORK_FILES, find_checkpoint, read_state_file
from src.config import ModelConfig
from src.hand.load import hand_model_problem, load_hand
from src.hand.skeleton import HandArrays
from src.model.net import PoseNet

_MAX_NAMED = 3  # tensors in a message


@dataclass(frozen=True)
class LoadedNetwork:
    """A trained network and the facts of its checkpoint."""

    network: PoseNet  # in eval mode
    folder: Path  # the checkpoint
    step: int  # optimizer steps done
    configuration: dict[str, Any]  # config.yaml of the run, as plain dicts, lists and values
    crop: float  # side of the patch over the side of the hand's box, TRAIN.expansion_ratio
    hand: HandArrays  # the hand model's arrays
    model_config: ModelConfig  # the MODEL section of the configuration


def load_network(
    path: str | Path,
    hand_model: str | Path | HandArrays | None = None,
    device: torch.device | str = "cpu",
) -> LoadedNetwork:
    """Load a trained network. The backbone's own weights folder is not needed.

    Args:
        path: a run folder (its newest complete checkpoint), one checkpoint in it, `<run folder>/checkpoints/best`, or a
            released network such as `model/hand-mini`.
        hand_model: a file with MANO's arrays, `standin`, or the arrays; None uses the one that the checkpoint names.
        device: where to put the network.

    Raises:
        ValueError: naming the file that is missing, corrupt or of another version, or the missing hand model.
    """
    folder, configuration = read_configuration(path)
    try:
        model = _model_config(configuration["MODEL"])
        crop = float(configuration["TRAIN"]["expansion_ratio"])
        shape = _backbone_shape(folder, model)
    except (OSError, ValueError, KeyError, TypeError, OmegaConfBaseException) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ValueError(
            f"the configuration of {folder} does not describe a network of this version: {reason}"
        ) from error
    hand = _choose_hand(folder, model.hand_model, hand_model)
    network = PoseNet(model, hand, shape)
    load_weights(network, folder)
    step = read_state_file(folder)["step"]
    return LoadedNetwork(network.to(device).eval(), folder, step, configuration, crop, hand, model)


def read_configuration(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Verify the checkpoint at `path` (see `load_network`); returns its folder and the run's configuration.

    Raises ValueError naming the file that is missing or corrupt.
    """
    folder = find_checkpoint(path, NETWORK_FILES)
    file = folder / CONFIG
    if not file.is_file():
        file = folder.parent.parent / CONFIG
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no {CONFIG}, nor does its run folder ({file}): give the checkpoint in its run folder"
        )
    try:
        return folder, OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error


def _model_config(section: Mapping[str, Any]) -> ModelConfig:
    """The MODEL section, typed. Other sections may be of another version: the network does not depend on them."""
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), dict(section))
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


def _choose_hand(folder: Path, trained_with: str, given: str | Path | HandArrays | None) -> HandArrays:
    """The hand model that the network was trained with, or the given one of the same kind.

    Raises ValueError if the file does not exist: MANO's licence forbids to redistribute it, so no checkpoint holds it.
    """
    if isinstance(given, HandArrays):
        hand = given
    else:
        name = trained_with if given is None else str(given)
        if problem := hand_model_problem(name):
            raise ValueError(f"hand model {problem}; pass its path as hand_model")
        hand = load_hand(name)
    if (trained_with == "standin") != (hand.name == "standin"):
        raise ValueError(
            f"{folder} was trained with the hand model {trained_with!r}, but {hand.name!r} was given: their pose and "
            "shape parameters are not compatible"
        )
    return hand


@dataclass
class WeightReport:
    """How the tensors of a file fit a model: their names, sorted."""

    loaded: int = 0
    missing: list[str] = field(default_factory=list)  # in the model, not in the file
    unexpected: list[str] = field(default_factory=list)  # in the file, not in the model
    misshapen: list[str] = field(default_factory=list)  # "name: file [..] model [..]"

    def problems(self) -> str:
        """Number and first names of the tensors that do not fit; empty if all do."""
        texts = []
        for kind in ("missing", "unexpected", "misshapen"):
            if names := getattr(self, kind):
                more = ", ..." if len(names) > _MAX_NAMED else ""
                texts.append(f"{len(names)} {kind}: {', '.join(names[:_MAX_NAMED])}{more}")
        return "; ".join(texts)

    def __str__(self) -> str:
        return f"{self.loaded} tensors loaded" + (f"; {problems}" if (problems := self.problems()) else "")


def init_from(model: nn.Module, path: str | Path) -> WeightReport:
    """Copy every tensor that fits from the checkpoint at `path` into a possibly different model.

    Raises ValueError if the checkpoint is incomplete or no tensor in it fits.
    """
    folder = find_checkpoint(path, NETWORK_FILES)
    report = _copy_weights(model, folder / MODEL)
    if not report.loaded:
        raise ValueError(f"no tensor of {folder / MODEL} fits this model: {report}")
    return report


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model from its own checkpoint. Raises ValueError if a tensor is missing, unexpected or misshapen."""
    if problems := _copy_weights(model, folder / MODEL).problems():
        raise ValueError(f"{folder / MODEL} does not fit this version of the network: {problems}")


@torch.no_grad()
def _copy_weights(model: nn.Module, file: Path) -> WeightReport:
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read weights from {file}: {error}") from error
    own = model.state_dict()
    report = WeightReport(unexpected=sorted(saved.keys() - own.keys()))
    filled: set[int] = set()  # addresses: tied parameters are stored under one of their names only
    for name in sorted(saved.keys() & own.keys()):
        if saved[name].shape != own[name].shape:
            report.misshapen.append(f"{name}: file {list(saved[name].shape)} model {list(own[name].shape)}")
            continue
        own[name].copy_(saved[name])
        filled.add(own[name].data_ptr())
        report.loaded += 1
    report.missing = sorted(name for name in own.keys() - saved.keys() if own[name].data_ptr() not in filled)
    return report
