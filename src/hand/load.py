"""Loads the hand model that the configuration names."""

from __future__ import annotations

from pathlib import Path

from src.hand.mano_file import load_hand_arrays
from src.hand.skeleton import HandArrays
from src.hand.standin.build import build_standin_hand


def load_hand(hand_model: str) -> HandArrays:
    """The hand model for `MODEL.hand_model`: the path of a MANO file, or `standin`."""
    return build_standin_hand() if hand_model == "standin" else load_hand_arrays(Path(hand_model))
