"""The converters by their name in script/make_shards.py. To add a data set, write one file and add one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from src.data.convert import dexycb, freihand, hamer, ho3d, interhand, realhands
from src.data.convert.chunk import ConvertSummary, Job, Option, Progress, Request
from src.data.convert.job import run


@dataclass(frozen=True)
class Converter:
    """A converter and the options it takes."""

    convert: Callable[[Request, Progress | None], ConvertSummary]
    what: str  # for --help
    splits: tuple[str, ...] = ()  # the default first; empty: the set has no splits
    open_split: bool = False  # other names are allowed too
    in_parallel: bool = True  # takes --num_process and --mano
    more: tuple[str, ...] = ()  # further options: num_per_shard, mano_left
    options: dict[str, Option] = field(default_factory=dict)  # numbers that only this converter takes


def _job(plan: Callable[[Request], Job]) -> Callable[[Request, Progress | None], ConvertSummary]:
    return lambda request, progress: run(plan(request), request, progress)


_REALHANDS = "the project's folder of real photographs"
CONVERTERS: dict[str, Converter] = {
    "realhands": Converter(realhands.convert_realhands, _REALHANDS, realhands.SPLITS, in_parallel=False),
    "freihand": Converter(_job(freihand.plan_freihand), "FreiHAND", freihand.SPLITS, more=("num_per_shard",)),
    "interhand": Converter(_job(interhand.plan_interhand), "InterHand2.6M", interhand.SPLITS, more=("num_per_shard",)),
    "dexycb": Converter(_job(dexycb.plan_dexycb), "DexYCB", dexycb.SPLITS, more=("mano_left",)),
    "ho3d": Converter(_job(ho3d.plan_ho3d), "HO-3D v3", ho3d.SPLITS, more=("num_per_shard",)),
    "hamer": Converter(
        _job(hamer.plan_hamer), "HaMeR's training tars", hamer.SPLITS, open_split=True, options=hamer.OPTIONS
    ),
}
