"""From a position in the data order to the patch that stands there: reads, checks, decodes, crops and augments.

Runs in worker processes and needs no torch. Shards are opened on first use and read with `pread`, so a dataset may be
copied into any number of processes. What cannot be used is reported beside the patches, with the reason.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from zlib import crc32

from src.batch import Sample
from src.data.augment import NUM_UNIFORM, draw_augmentation, identity_augmentation
from src.data.blob import SampleError
from src.data.crop import PatchSample, crop_sample, padding_patch
from src.data.index import ShardIndex
from src.data.index_build import note_crc
from src.data.plan import Place
from src.data.rng import uniforms
from src.data.sample import decode_image, make_sample
from src.data.schema import Clip, parse_clip
from src.data.tar import BLOCK, TarError, read_header, span_members, split_name

_MAX_OPEN = 128  # shards held open by one process
_MAX_CLIP = 512  # clips whose annotations are kept
_MAX_ATTEMPT = 20
_WHOLE_SIZE = 1 << 18  # samples up to this size are read in one piece


class Plan(Protocol):
    """What a dataset needs of src/data/plan.py."""

    @property
    def num_frame(self) -> int: ...

    def locate(self, position: int) -> Place: ...


@dataclass(frozen=True)
class BadFrame:
    """A frame that could not be used at `position`."""

    position: int
    shard: str
    key: str  # "<sample key>/<frame>"
    reason: str
    detail: str


@dataclass
class Fetched:
    """The rows of one batch, and what was bad on the way."""

    rows: list[PatchSample] = field(default_factory=list)
    bad: list[BadFrame] = field(default_factory=list)


class ShardReader:
    """Reads single frames of one shard."""

    def __init__(self, index: ShardIndex, stride: int) -> None:
        self.name, self.fd = str(index.shard), os.open(index.shard, os.O_RDONLY)
        self.stamp = index.shard_size, index.shard_mtime_ns
        self.tables = index.tables()
        self.rows = self.tables.rows(stride)
        self.clips: OrderedDict[int, tuple[str, Clip]] = OrderedDict()

    def close(self) -> None:
        os.close(self.fd)

    def describe(self, row: int) -> str:
        """ "<sample key>/<frame>" of a row that cannot be read otherwise, from its header in the archive."""
        if self.rows is not None:
            row = int(self.rows[row])
        sample_row, number = self.tables.frame[row].item()[:2]
        offset = int(self.tables.sample["offset"][sample_row])
        try:
            parts = split_name(read_header(os.pread(self.fd, BLOCK, offset))[0])
        except (TarError, OSError):
            parts = None
        return f"{parts[0] if parts else f'byte {offset}'}/{number}"

    def _pread(self, offset: int, size: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise self._changed("truncated", f"{self.name} ends at {offset + len(data)}")
        return data

    def read(self, row: int) -> tuple[str, Clip, int, bytes]:
        """(key, annotations, frame number, encoded image) of a row. Raises SampleError, OSError."""
        if self.rows is not None:
            row = int(self.rows[row])
        sample_row, number, begin, size, crc = self.tables.frame[row].item()
        offset, _, sample_size, image_begin, image_end, _ = self.tables.sample[sample_row].item()
        if sample_row in self.clips or sample_size > _WHOLE_SIZE:
            note, image = None, self._pread(offset + begin, size)
        else:
            whole = self._pread(offset, sample_size)
            note, image = whole[:image_begin] + whole[image_end:], whole[begin : begin + size]
        if crc32(image) != crc:
            raise self._changed("crc_image", f"frame {number} behind byte {offset} of {self.name}")
        key, clip = self._clip(sample_row, note)
        return key, clip, number, image

    def annotation(self, row: int) -> tuple[Clip, int]:
        """(annotations, frame number) of a row; the image is not even read. Raises SampleError, OSError."""
        if self.rows is not None:
            row = int(self.rows[row])
        sample_row, number = self.tables.frame[row].item()[:2]
        return self._clip(sample_row, None)[1], number

    def _clip(self, sample_row: int, note: bytes | None) -> tuple[str, Clip]:
        """(key, annotations) of a sample, from the bytes in front of and behind its images; None: read them."""
        if (known := self.clips.get(sample_row)) is not None:
            return known
        offset, _, sample_size, image_begin, image_end, _ = self.tables.sample[sample_row].item()
        if note is None:
            note = self._pread(offset, image_begin) if image_begin else b""
            note += self._pread(offset + image_end, sample_size - image_end) if image_end < sample_size else b""
        clip = self._parse(sample_row, note)
        if len(self.clips) >= _MAX_CLIP:
            self.clips.popitem(last=False)
        self.clips[sample_row] = clip
        return clip

    def _changed(self, reason: str, detail: str) -> SampleError:
        """The error for bytes that differ from those indexed: they have rotted, or somebody wrote the shard anew."""
        stat = os.fstat(self.fd)
        if self.stamp != (stat.st_size, stat.st_mtime_ns):
            reason, detail = "stale_index", f"{detail}; the shard was written after it was indexed"
        return SampleError(reason, detail)

    def _parse(self, sample_row: int, note: bytes) -> tuple[str, Clip]:
        try:
            key, members = span_members(note)
        except TarError as error:
            raise self._changed("crc_note", f"a header does not parse ({error})") from None
        crc = 0
        for suffix, data in members.items():
            crc = note_crc(crc, suffix, data)
        if crc != int(self.tables.sample["note_crc"][sample_row]):
            raise self._changed("crc_note", f"annotations of {key!r}")
        return key, parse_clip(members, check=False)


class HandDataset:
    """Map-style: positions of the data order in, patches out. `__getitems__` is what a DataLoader calls."""

    def __init__(
        self,
        sources: Sequence[Sequence[ShardIndex]],
        plan: Plan,
        *,
        stride: int,
        hand_model: str,
        img_size: int,
        expansion_ratio: float,
        augment: Any = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            sources: the shards of each source that the plan speaks of.
            plan: a MixedPlan (training: endless, bad frames are replaced) or a FixedPlan (validation: bad frames become
                padding rows).
            stride: as the plan's.
            hand_model: name of the run's hand model; MANO parameters of another are no target.
            img_size: side of the patch, px; expansion_ratio: side of the crop over the longer side of the hand's box.
            augment: the TRAIN section with the knobs of src/data/augment.py; None: the identity.
            seed: of the augmentation, which depends on it and the position alone.
        """
        self.sources, self.plan, self.stride = [list(source) for source in sources], plan, stride
        self.hand_model, self.img_size, self.expansion_ratio = hand_model, img_size, expansion_ratio
        self.augment, self.seed = augment, seed
        self._readers: OrderedDict[tuple[int, int], ShardReader] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict()}

    def __len__(self) -> int:
        return self.plan.num_frame

    def __getitems__(self, positions: Sequence[int]) -> Fetched:
        """The patches at `positions`, in that order; position -1 is a padding row."""
        fetched = Fetched()
        for position in positions:
            fetched.rows.append(self._row(position, fetched.bad))
        return fetched

    def _row(self, position: int, bad: list[BadFrame]) -> PatchSample:
        substitute = getattr(self.plan, "substitute", None)
        if position < 0:
            return padding_patch(self.img_size)
        place = self.plan.locate(position)
        for attempt in range(1, _MAX_ATTEMPT + 1):
            try:
                return self.patch(position, self.read(place))
            except (SampleError, OSError) as error:
                bad.append(self._report(position, place, error))
            if substitute is None:
                return padding_patch(self.img_size)
            place = substitute(position, attempt)
        raise RuntimeError(f"position {position}: {_MAX_ATTEMPT} frames in a row cannot be used, the last: {bad[-1]}")

    def read(self, place: Place) -> Sample:
        """The decoded Sample at a place. Raises SampleError, OSError."""
        key, clip, number, image = self._reader(place).read(place.row)
        return make_sample(clip, number, decode_image(image), key, self.hand_model)

    def annotation(self, place: Place) -> tuple[Clip, int]:
        """The clip at a place and the frame's number in it, without reading the image. Raises as `read`."""
        return self._reader(place).annotation(place.row)

    def patch(self, position: int, sample: Sample) -> PatchSample:
        """The sample as it is shown at `position`: cropped, and augmented by a function of seed and position."""
        augmentation = identity_augmentation()
        if self.augment is not None:
            numbers = uniforms("augment", self.seed, position, num=NUM_UNIFORM)
            augmentation = draw_augmentation(numbers, self.augment)
        return crop_sample(sample, augmentation, self.img_size, self.expansion_ratio, position)

    def _reader(self, place: Place) -> ShardReader:
        at = (place.source, place.shard)
        if at not in self._readers:
            if len(self._readers) >= _MAX_OPEN:
                self._readers.popitem(last=False)[1].close()
            self._readers[at] = ShardReader(self.sources[place.source][place.shard], self.stride)
        self._readers.move_to_end(at)
        return self._readers[at]

    def _report(self, position: int, place: Place, error: Exception) -> BadFrame:
        shard = str(self.sources[place.source][place.shard].shard)
        reason = error.reason if isinstance(error, SampleError) else "unreadable"
        reader = self._readers.get((place.source, place.shard))
        key = reader.describe(place.row) if reader else f"row {place.row}"
        return BadFrame(position, shard, key, reason, str(error))
