"""The interface between a data set's converter and job.py: chunks of work, requests, skipped hands, the summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.data.shards.errors import SampleError, reason_of
from src.data.shards.writer import HandRecord

Progress = Callable[[int, int], None]  # called with (done, total)
Records = Iterator[HandRecord | SampleError]  # hands, and the reasons why hands or images are skipped


def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
    """`read(*arguments)`, or a SampleError if that fails: malformed annotations may raise anything, which costs one
    hand and not the conversion. Raises OSError."""
    try:
        return read(*arguments)
    except OSError:
        raise
    except Exception as error:  # returned as a new one: the traceback of the old one keeps the image alive
        return SampleError(reason_of(error), getattr(error, "detail", repr(error)))


def attempt_each(read: Callable[..., HandRecord], work: Sequence[tuple[Any, ...]]) -> Records:
    """`attempt` for each entry of `work`, the arguments of `read`."""
    for arguments in work:
        yield attempt(read, *arguments)


@dataclass(frozen=True)
class Chunk:
    """The work for one shard. `read(*arguments)` yields its hands in order; both are sent to worker processes."""

    name: str  # of the shard below the output folder, without .tar, e.g. "000000" or "freihand-train/000000"
    size: int  # progress units: images, or shards where the number of images is not known in advance
    read: Callable[..., Records]
    arguments: tuple[Any, ...]

    @property
    def group(self) -> str:
        """Chunks of one group share their MANO convention."""
        return self.name.rpartition("/")[0]


def chunks_of(
    read: Callable[[Sequence[Any]], Records], work: Sequence[Any], num_per_shard: int, first: int = 0
) -> list[Chunk]:
    """Chunks of at most `num_per_shard` consecutive entries of `work`, numbered from `first`."""
    parts = (work[begin : begin + num_per_shard] for begin in range(0, len(work), num_per_shard))
    return [Chunk(f"{number:06d}", len(part), read, (part,)) for number, part in enumerate(parts, first)]


@dataclass(frozen=True)
class Job:
    """A conversion as a data set's converter plans it, before any hand is read."""

    name: str
    chunks: list[Chunk]
    tolerance_mm: float  # mean joint error that the MANO check accepts
    sides: tuple[str, ...] = ("left", "right")
    left_file_shape: bool = False  # whether left betas may be defined for MANO_LEFT.pkl as published
    without_mano: str = "MANO conventions are those of the official code; pass --mano to check them on the data"
    note: tuple[str, ...] = ()  # lines to print, e.g. files of the set that are not used


@dataclass(frozen=True)
class Option:
    """A number, 0 or more, that one converter takes as `--name`."""

    default: float  # int if the option is one
    help: str


@dataclass(frozen=True)
class Request:
    """The user's options."""

    input: Path
    output: Path
    split: str
    num_process: int = 1
    num_per_shard: int = 2000
    mano: Path | None = None
    mano_left: Path | None = None
    options: dict[str, float] = field(default_factory=dict)  # the converter's own, by name


@dataclass(frozen=True)
class ConvertSummary:
    """What a converter wrote, and how many hands it skipped for each reason."""

    num_hand: int
    num_shard: int
    skipped: dict[str, int] = field(default_factory=dict)
    withheld: dict[str, int] = field(default_factory=dict)  # labels set to unknown in the hands written, by reason
    note: tuple[str, ...] = ()  # lines to print: results of the MANO check, an example of each reason


def take(records: Records, skipped: list[SampleError] | None = None) -> Iterator[HandRecord]:
    """The hands among what a chunk yields; the errors are appended to `skipped`."""
    for record in records:
        if isinstance(record, HandRecord):
            yield record
        elif skipped is not None:
            skipped.append(record)
