"""Every converter by the name that script/make_shards.py knows it by. A new data set: one file, one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from src.data.convert import dexycb, freihand, hamer, ho3d, interhand, realhands
from src.data.convert.chunk import Request
from src.data.shards.writer import ConvertSummary, Progress


@dataclass(frozen=True)
class Converter:
    """How to run one converter, and which options it takes."""

    convert: Callable[[Request, Progress | None], ConvertSummary]
    what: str  # for --help
    splits: tuple[str, ...] = ()  # the default first; none: the set has no splits
    open_split: bool = False  # other names are allowed too
    in_parallel: bool = True  # takes --num_process and --mano
    more: tuple[str, ...] = ()  # further options: num_per_shard, mano_left


def _realhands(request: Request, progress: Progress | None) -> ConvertSummary:
    return realhands.convert_realhands(request.input, request.output, progress, request.split)


CONVERTERS: dict[str, Converter] = {
    "realhands": Converter(_realhands, "the small folder of real photographs", realhands.SPLITS, in_parallel=False),
    "freihand": Converter(freihand.convert_freihand, "FreiHAND", freihand.SPLITS, more=("num_per_shard",)),
    "interhand": Converter(interhand.convert_interhand, "InterHand2.6M", interhand.SPLITS, more=("num_per_shard",)),
    "dexycb": Converter(dexycb.convert_dexycb, "DexYCB", dexycb.SPLITS, more=("mano_left",)),
    "ho3d": Converter(ho3d.convert_ho3d, "HO-3D v3", ho3d.SPLITS, more=("num_per_shard",)),
    "hamer": Converter(hamer.convert_hamer, "HaMeR's training tars", hamer.SPLITS, open_split=True),
}
