"""Decoders of other projects, rebuilt from what they publish, to compare ours with. No part of the package."""

from __future__ import annotations

import importlib
from typing import Any

PEERS = {"hamer": ("script.benchmarks.peers.hamer", "HamerNet"), "csvit": ("script.benchmarks.peers.csvit", "CsVitNet")}


def load_peer(name: str) -> Any:
    """The network class of a peer: `hamer` or `csvit`. Imports torch."""
    module, network = PEERS[name]
    return getattr(importlib.import_module(module), network)
