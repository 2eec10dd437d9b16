"""From a position in the data order to the patch that stands there: reads, checks, decodes, crops and augments.

Runs in worker processes and needs no torch. Shards are opened on first use and read with `pread`, so a dataset may be
copied into any number of processes. What cannot be used is reported beside the patches, with the reason.

A batch is made in two passes. The first reads and checks all frames, then turns their annotations, all at once. The
second decodes and paints one picture after the other. Python's own work then finds its code in the processor's caches,
which every decode clears.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from src.batch import Sample
from src.data.augment import NUM_UNIFORM, Augmentation, draw_augmentation, identity_augmentation
from src.data.crop import PatchSample, fill_patch, padding_patch, turn_samples
from src.data.image import decode_image, image_info
from src.data.order.plan import MixedPlan, Place
from src.data.order.readahead import ReadAhead
from src.data.rng import uniforms
from src.data.sample import annotated_sample, make_sample
from src.data.shards.annotation import Clip
from src.data.shards.errors import SampleError, reason_of
from src.data.shards.index import ShardIndex
from src.data.shards.reader import ClipCache, ShardReader
from src.geometry.patch import Warp, plan_warps

_MAX_OPEN = 512  # shards held open by one process: an order works on some 256 blocks at a time
MAX_ATTEMPT = 20  # frames that are tried for a position


class Plan(Protocol):
    """What a dataset needs of src/data/order/plan.py."""

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
    patches: np.ndarray | None = None  # [B, 3, S, S] uint8, of which the rows' patches are parts


@dataclass
class _Frame:
    """The frame that was read for a position, its picture still encoded."""

    position: int
    place: Place
    attempt: int  # how many frames were tried before
    image: memoryview  # encoded
    size: tuple[int, int]  # of the image, px
    sample: Sample
    augmentation: Augmentation


@dataclass
class _Turn:
    """A frame with its row, whose patch is still to be painted as `warp` says."""

    frame: _Frame
    row: PatchSample
    warp: Warp | None


def open_file_limit() -> int:
    """How many files this process may hold open."""
    try:
        import resource
    except ImportError:  # no such thing on Windows
        return 512
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


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
        self._clips = ClipCache()
        self._max_open = min(_MAX_OPEN, max(8, (open_file_limit() - 256) // 2))  # a shard takes two: itself, its index
        self.ahead = ReadAhead(plan, self.sources) if isinstance(plan, MixedPlan) else None

    def __getstate__(self) -> dict[str, Any]:
        ahead = ReadAhead(self.plan, self.sources) if isinstance(self.plan, MixedPlan) else None
        return {**self.__dict__, "_readers": OrderedDict(), "_clips": ClipCache(), "ahead": ahead}

    def __len__(self) -> int:
        return self.plan.num_frame

    def __getitems__(self, positions: Sequence[int]) -> Fetched:
        """The patches at `positions`, in that order; position -1 is a padding row."""
        if self.ahead:
            self.ahead.go_on(positions)
        patches = np.empty((len(positions), 3, self.img_size, self.img_size), np.uint8)
        fetched = Fetched(patches=patches)
        turns = self._turned([self._find(position, fetched.bad) for position in positions], patches, fetched.bad)
        for turn, patch in zip(turns, patches):
            while turn is not None and not self._paint(turn, fetched.bad):
                frame = self._find(turn.frame.position, fetched.bad, turn.frame.attempt + 1)
                turn = self._turned_alone(frame, patch, fetched.bad)
            fetched.rows.append(padding_patch(self.img_size, patch) if turn is None else turn.row)
        fetched.bad.sort(key=lambda bad: positions.index(bad.position))
        return fetched

    def _find(self, position: int, bad: list[BadFrame], attempt: int = 0) -> _Frame | None:
        """Read the frame at `position`, or the first of its substitutes that can be read; None: padding."""
        can_replace = isinstance(self.plan, MixedPlan)
        while position >= 0 and (attempt == 0 or can_replace):
            if attempt == MAX_ATTEMPT:
                return None  # src/data/health.py stops the run
            place = self.plan.substitute(position, attempt) if attempt else self.plan.locate(position)
            try:
                return self._open(position, place, attempt)
            except Exception as error:
                bad.append(self._report(position, place, error))
            attempt += 1
        return None

    def _open(self, position: int, place: Place, attempt: int) -> _Frame:
        """A frame with all that its header and annotations say. Hostile bytes may raise anything."""
        key, clip, number, image = self.fetch(place)
        _, size = image_info(image)
        sample = annotated_sample(clip, number, size, key, self.hand_model)
        return _Frame(position, place, attempt, image, size, sample, self._augmentation(position))

    def _turned(
        self, frames: Sequence[_Frame | None], patches: Sequence[np.ndarray], bad: list[BadFrame]
    ) -> list[_Turn | None]:
        """`_turn`; where one frame's values stop the arithmetic of all, frame by frame."""
        try:
            return self._turn(frames, patches)
        except Exception:
            return [self._turned_alone(frame, patch, bad) for frame, patch in zip(frames, patches)]

    def _turned_alone(self, frame: _Frame | None, patch: np.ndarray, bad: list[BadFrame]) -> _Turn | None:
        """The row of a frame, or of the first of its substitutes that has one."""
        while frame is not None:
            try:
                return self._turn([frame], [patch])[0]
            except Exception as error:
                bad.append(self._report(frame.position, frame.place, error))
            frame = self._find(frame.position, bad, frame.attempt + 1)
        return None

    def _turn(self, frames: Sequence[_Frame | None], patches: Sequence[np.ndarray]) -> list[_Turn | None]:
        """The rows of frames, everything that can be done before pictures are decoded; None stays None."""
        some = [(frame, patch) for frame, patch in zip(frames, patches) if frame is not None]
        if not some:
            return [None] * len(frames)
        found, planes = zip(*some)
        samples, augmentations = [frame.sample for frame in found], [frame.augmentation for frame in found]
        positions = [frame.position for frame in found]
        rows, views = turn_samples(samples, augmentations, planes, self.expansion_ratio, positions)
        warps = plan_warps([frame.size for frame in found], views, self.img_size)
        turns = iter([_Turn(*parts) for parts in zip(found, rows, warps)])
        return [None if frame is None else next(turns) for frame in frames]

    def _paint(self, turn: _Turn, bad: list[BadFrame]) -> bool:
        """Decode the picture and paint its patch; False where that is not possible."""
        frame = turn.frame
        try:
            image = decode_image(frame.image)
            if image.shape[1::-1] != frame.size:
                raise SampleError("undecodable_image", f"{image.shape[1::-1]} pixels behind a header of {frame.size}")
            fill_patch(turn.row.patch, image, turn.warp, frame.augmentation.pixel)
        except Exception as error:
            bad.append(self._report(frame.position, frame.place, error))
            return False
        return True

    def read(self, place: Place) -> Sample:
        """The decoded Sample at a place. Raises SampleError, OSError."""
        key, clip, number, image = self.fetch(place)
        return make_sample(clip, number, decode_image(image), key, self.hand_model)

    def fetch(self, place: Place) -> tuple[str, Clip, int, memoryview]:
        """(key, annotations, frame number, encoded image) at a place. Raises as `read`."""
        return self._reader(place).read(place.row)

    def annotation(self, place: Place) -> tuple[Clip, int]:
        """The clip at a place and the frame's number in it, without reading the image. Raises as `read`."""
        return self._reader(place).annotation(place.row)

    def _augmentation(self, position: int) -> Augmentation:
        """What is done to the sample at `position`: a function of it and the seed."""
        if self.augment is None:
            return identity_augmentation()
        return draw_augmentation(uniforms("augment", self.seed, position, num=NUM_UNIFORM), self.augment)

    def _reader(self, place: Place) -> ShardReader:
        at = (place.source, place.shard)
        if at not in self._readers:
            if len(self._readers) >= self._max_open:
                self._readers.popitem(last=False)[1].close()
            index = self.sources[place.source][place.shard]
            self._readers[at] = ShardReader(index, self.stride, self._clips)
        self._readers.move_to_end(at)
        return self._readers[at]

    def _report(self, position: int, place: Place, error: Exception) -> BadFrame:
        shard = str(self.sources[place.source][place.shard].shard)
        reader = self._readers.get((place.source, place.shard))
        key = reader.describe(place.row) if reader else f"row {place.row}"
        return BadFrame(position, shard, key, reason_of(error), str(error) or repr(error))
