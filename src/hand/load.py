"""Loads the hand model that the configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from src.hand.skeleton import HandArrays

STANDIN = "standin"


def hand_model_problem(hand_model: str) -> str | None:
    """Why `MODEL.hand_model` cannot be loaded; None if it is `standin` or an existing file. Imports nothing heavy."""
    if hand_model == STANDIN or Path(hand_model).is_file():
        return None
    return f"{hand_model}: there is no such file. MANO_RIGHT.pkl is available from https://mano.is.tue.mpg.de"


def load_hand(hand_model: str) -> HandArrays:
    """The hand model for `MODEL.hand_model`: the path of a MANO file, or `standin`."""
    from src.hand.mano_file import load_hand_arrays
    from src.hand.standin.build import build_standin_hand

    return build_standin_hand() if hand_model == STANDIN else load_hand_arrays(Path(hand_model))
