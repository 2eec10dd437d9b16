"""Loads the hand model that the configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from src.hand.skeleton import HandArrays

STANDIN = "standin"
_SUFFIXES = (".pkl", ".npz")
_SUBFOLDERS = (".", "mano", "models", "models/mano", "mano_v1_2/models")  # smplx's layout, and that of the archive


def mano_path(path: str | Path, name: str = "MANO_RIGHT") -> Path:
    """The MANO file that `path` names: the path itself, or if it is a folder, the file called `name` in it."""
    path = Path(path)
    candidates = (path / folder / f"{name}{suffix}" for folder in _SUBFOLDERS for suffix in _SUFFIXES)
    return next((file for file in candidates if file.is_file()), path)


def mano_problem(path: str | Path, name: str = "MANO_RIGHT") -> str | None:
    """Why `mano_path` finds no MANO file; None if it does. Imports nothing heavy."""
    file = mano_path(path, name)
    if file.is_file() and file.suffix in _SUFFIXES:
        return None
    if file.is_file():
        return f"{path}: must be a .pkl or .npz file with MANO's arrays"
    what = f"this folder does not contain {name}.pkl" if file.is_dir() else "there is no such file"
    return f"{path}: {what}. {name}.pkl is available from https://mano.is.tue.mpg.de"


def hand_model_problem(hand_model: str) -> str | None:
    """Why `MODEL.hand_model` cannot be loaded; None if it is `standin`, a file, or a folder with MANO_RIGHT.pkl.

    Imports nothing heavy.
    """
    return None if hand_model == STANDIN else mano_problem(hand_model)


def load_hand(hand_model: str) -> HandArrays:
    """The hand model for `MODEL.hand_model`: the path of a MANO file or of its folder, or `standin`."""
    from src.hand.mano_file import load_hand_arrays
    from src.hand.standin.build import build_standin_hand

    return build_standin_hand() if hand_model == STANDIN else load_hand_arrays(hand_model)
