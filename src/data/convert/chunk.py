"""What a converter hands to job.py: its work cut into chunks, one for each shard, and what the user asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.data.shards.safe_parse import reason_of
from src.data.shards.writer import HandRecord


@dataclass(frozen=True)
class Skip:
    """A hand or image that is left out, and why: `reason` is counted, `detail` is for people."""

    reason: str
    detail: str = ""

    @classmethod
    def because_of(cls, error: Exception) -> Skip:
        """What hostile annotations may provoke costs their hand, not the conversion."""
        return cls(reason_of(error), getattr(error, "detail", repr(error)))


Records = Iterator["HandRecord | Skip"]


@dataclass(frozen=True)
class Chunk:
    """One shard's worth of work. `read(*arguments)` yields its hands in order; both travel to another process."""

    name: str  # of the shard below the output folder, without .tar, e.g. "000000" or "freihand-train/000000"
    size: int  # units of progress: images, or shards where their number is not known beforehand
    read: Callable[..., Records]
    arguments: tuple[Any, ...]

    @property
    def group(self) -> str:
        """Chunks of one group share their MANO convention."""
        return self.name.rpartition("/")[0]


@dataclass(frozen=True)
class Job:
    """Everything a data set's converter knows before it reads hands."""

    name: str
    chunks: list[Chunk]
    tolerance_mm: float  # of the MANO proof, mean joint error
    sides: tuple[str, ...] = ("left", "right")
    left_file_shape: bool = False  # whether left betas may be those of the published MANO_LEFT.pkl
    without_mano: str = "MANO conventions are those of the official code; give --mano to prove them on the data"


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    input: Path
    output: Path
    split: str
    num_process: int = 1
    num_per_shard: int = 2000
    mano: Path | None = None
    mano_left: Path | None = None


def take(records: Records, skipped: list[Skip] | None = None) -> Iterator[HandRecord]:
    """The hands among what a chunk yields; what is left out is added to `skipped`."""
    for record in records:
        if isinstance(record, HandRecord):
            yield record
        elif skipped is not None:
            skipped.append(record)
