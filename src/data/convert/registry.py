"""Every converter by the name that script/make_shards.py knows it by. A new data set: one file, one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from src.data.convert.native import ConvertSummary, Progress
from src.data.convert.realhands import convert_realhands

Converter = Callable[[Path, Path, Progress | None], ConvertSummary]

CONVERTERS: dict[str, Converter] = {
    "realhands": convert_realhands,
}
