"""Taking over weights into a changed model, with a report of what did not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn


@dataclass
class WeightReport:
    """What `load_weights` could not use: names of parameters, sorted."""

    loaded: int = 0
    missing: list[str] = field(default_factory=list)  # in the model, not in the file
    unexpected: list[str] = field(default_factory=list)  # in the file, not in the model
    misshapen: list[str] = field(default_factory=list)  # "name: file [..] model [..]"

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded"]
        for name in ("missing", "unexpected", "misshapen"):
            keys = getattr(self, name)
            if keys:
                parts.append(f"{len(keys)} {name}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}")
        return "; ".join(parts)


def load_weights(model: nn.Module, path: Path) -> WeightReport:
    """Take over every tensor that fits from a safetensors file, or from the checkpoint folder that holds one.

    Raises ValueError when the file cannot be read or no tensor in it fits.
    """
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot read weights from {file}: {error}; give a checkpoint or a .safetensors file"
        ) from error
    own = model.state_dict()
    report = WeightReport(unexpected=sorted(saved.keys() - own.keys()))
    fitting: set[int] = set()  # storages that were filled: a tied parameter is stored under one of its names only
    with torch.no_grad():
        for name in sorted(saved.keys() & own.keys()):
            if saved[name].shape != own[name].shape:
                report.misshapen.append(f"{name}: file {list(saved[name].shape)} model {list(own[name].shape)}")
                continue
            own[name].copy_(saved[name])
            fitting.add(own[name].data_ptr())
            report.loaded += 1
    report.missing = sorted(k for k in own.keys() - saved.keys() if own[k].data_ptr() not in fitting)
    if not report.loaded:
        raise ValueError(f"no tensor of {file} fits this model: {report}")
    return report
