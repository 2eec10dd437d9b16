"""From positions of the data order to a batch: reads, checks, decodes, crops and augments the frames.

Runs in worker processes and needs no torch: batches hold numpy arrays. Shards are opened on first use and read with
`pread`, so a dataset may be copied into any number of processes.

A batch is filled in stages: read and check all frames, compute all labels at once, then decode and crop one image after
the other. Keeping decoding apart is faster, because each decode evicts Python's own code from the processor's caches.
A row whose frame fails in any stage is reported with the reason and, in training, retried with a substitute frame.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit
from typing import Any

from src.batch import Batch, Sample
from src.data.augment import NUM_UNIFORM, Augmentation, draw_augmentation
from src.data.crop import empty_batch, fill_labels, fill_patch, pad_rows
from src.data.image import decode_image, image_info
from src.data.order.plan import FixedPlan, MixedPlan, Place
from src.data.order.readahead import ReadAhead
from src.data.rng import uniforms
from src.data.sample import annotated_sample, make_sample
from src.data.shards.annotation import Clip
from src.data.shards.errors import SampleError, reason_of
from src.data.shards.index import ShardIndex
from src.data.shards.reader import ClipCache, ShardReader
from src.geometry.patch import Warp, plan_warps

_MAX_OPEN = 512  # shards held open by one process; a data order reads from about 256 blocks at a time
MAX_ATTEMPT = 20  # frames tried for one position of training


@dataclass(frozen=True)
class BadFrame:
    """A frame that could not be used at `position`."""

    position: int
    shard: str
    key: str  # "<sample key>/<frame>"
    reason: str


@dataclass
class Fetched:
    """One batch as numpy arrays, and the frames that could not be used for it."""

    batch: Batch
    bad: list[BadFrame]


@dataclass
class _Frame:
    """The frame for one row of a batch; each stage sets the fields that the next one needs."""

    row: int
    position: int
    place: Place
    image: memoryview | None = None  # encoded
    size: tuple[int, int] = (0, 0)  # of the image, px
    sample: Sample | None = None
    augmentation: Augmentation | None = None
    warp: Warp | None = None


def open_file_limit() -> int:
    """How many files this process may hold open."""
    limit = getrlimit(RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == RLIM_INFINITY else limit


class HandDataset:
    """Map-style dataset over positions of the data order; a DataLoader calls `__getitems__`."""

    def __init__(
        self,
        sources: Sequence[Sequence[ShardIndex]],
        plan: MixedPlan | FixedPlan,
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
            sources: the shards of each source that the plan refers to.
            plan: a MixedPlan (training: endless, bad frames are substituted) or a FixedPlan (validation: bad frames
                become padding rows).
            stride: the plan's stride.
            hand_model: name of the run's hand model; MANO parameters of another model are not used.
            img_size: side of the patch, px; expansion_ratio: side of the crop over the longer side of the hand's box.
            augment: the TRAIN section with the knobs of src/data/augment.py; None: no augmentation.
            seed: of the augmentation, which is a function of the seed and the position.
        """
        self.sources, self.plan, self.stride = [list(source) for source in sources], plan, stride
        self.hand_model, self.img_size, self.expansion_ratio = hand_model, img_size, expansion_ratio
        self.augment, self.seed = augment, seed
        self._max_open = min(_MAX_OPEN, max(8, (open_file_limit() - 256) // 2))  # two files each: shard and index
        self._reset()

    def _reset(self) -> None:
        """Set what belongs to one process: open shards, cached annotations, read-ahead."""
        self._readers: OrderedDict[tuple[int, int], ShardReader] = OrderedDict()
        self._clips = ClipCache()
        self.readahead = ReadAhead(self.plan, self.sources) if isinstance(self.plan, MixedPlan) else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_readers", "_clips", "readahead")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __len__(self) -> int:
        return self.plan.num_frame

    def __getitems__(self, positions: Sequence[int]) -> Fetched:
        """The batch of the patches at `positions`, in that order; position -1 makes a padding row."""
        if self.readahead:
            self.readahead.advance(positions)
        fetched = Fetched(empty_batch(len(positions), self.img_size), [])
        pending = [row for row, position in enumerate(positions) if position >= 0]
        attempt = 0
        while pending and attempt < (MAX_ATTEMPT if isinstance(self.plan, MixedPlan) else 1):
            frames = [_Frame(row, positions[row], self._place(positions[row], attempt)) for row in pending]
            filled = {frame.row for frame in self._fill(frames, fetched)}
            pending = [row for row in pending if row not in filled]
            attempt += 1
        # Rows still pending have no usable frame: in training, src/data/health.py stops the run.
        pad_rows(fetched.batch, [row for row, position in enumerate(positions) if position < 0] + pending)
        fetched.bad.sort(key=lambda bad: positions.index(bad.position))
        return fetched

    def _place(self, position: int, attempt: int) -> Place:
        """The frame at `position`, or (attempt 1, 2, ...) a substitute for it."""
        return self.plan.substitute(position, attempt) if attempt else self.plan.locate(position)

    def _fill(self, frames: list[_Frame], fetched: Fetched) -> list[_Frame]:
        """Fill the frames' rows of the batch; returns the frames that succeeded."""
        batch, bad = fetched.batch, fetched.bad
        frames = self._keep_good(self._read, frames, bad)
        try:
            self._label(batch, frames)
        except Exception:  # one frame's values break the computation for all: find out whose
            frames = self._keep_good(lambda frame: self._label(batch, [frame]), frames, bad)
        return self._keep_good(lambda frame: self._crop(batch, frame), frames, bad)

    def _keep_good(self, stage: Callable[[_Frame], None], frames: list[_Frame], bad: list[BadFrame]) -> list[_Frame]:
        """Run a stage on each frame; frames for which it fails are reported. Malformed bytes may raise anything."""
        good = []
        for frame in frames:
            try:
                stage(frame)
                good.append(frame)
            except Exception as error:
                bad.append(self._report(frame, error))
        return good

    def _read(self, frame: _Frame) -> None:
        """Read annotations and encoded image, parse and check the annotations and the image's header."""
        key, clip, number, frame.image = self.fetch(frame.place)
        _, frame.size = image_info(frame.image)
        frame.sample = annotated_sample(clip, number, frame.size, key, self.hand_model)
        frame.augmentation = self._augmentation(frame.position)

    def _label(self, batch: Batch, frames: Sequence[_Frame]) -> None:
        """Fill everything but the patches, which does not need the pixels."""
        if not frames:
            return
        rows, samples = [frame.row for frame in frames], [frame.sample for frame in frames]
        view = fill_labels(batch, rows, samples, [frame.augmentation for frame in frames], self.expansion_ratio)
        batch.position[rows] = [frame.position for frame in frames]
        for frame, warp in zip(frames, plan_warps([frame.size for frame in frames], view, self.img_size)):
            frame.warp = warp

    def _crop(self, batch: Batch, frame: _Frame) -> None:
        image = decode_image(frame.image)
        if image.shape[1::-1] != frame.size:
            raise SampleError("undecodable_image", f"the header states {frame.size}, decoded {image.shape[1::-1]} px")
        fill_patch(batch.patch[frame.row], image, frame.warp, frame.augmentation.pixel)

    def read(self, place: Place) -> Sample:
        """The Sample at a Place with its decoded image. Raises SampleError, OSError."""
        key, clip, number, image = self.fetch(place)
        return make_sample(clip, number, decode_image(image), key, self.hand_model)

    def fetch(self, place: Place) -> tuple[str, Clip, int, memoryview]:
        """(key, annotations, frame number, encoded image) at a Place. Raises SampleError, OSError."""
        return self._reader(place).read(place.row)

    def annotation(self, place: Place) -> tuple[Clip, int]:
        """(annotations, frame number) at a Place, without reading the image. Raises SampleError, OSError."""
        return self._reader(place).annotation(place.row)

    def _augmentation(self, position: int) -> Augmentation:
        if self.augment is None:
            return Augmentation()
        return draw_augmentation(uniforms("augment", self.seed, position, num=NUM_UNIFORM), self.augment)

    def _reader(self, place: Place) -> ShardReader:
        shard = (place.source, place.shard)
        if shard not in self._readers:
            if len(self._readers) >= self._max_open:
                self._readers.popitem(last=False)[1].close()
            index = self.sources[place.source][place.shard]
            self._readers[shard] = ShardReader(index, self.stride, self._clips)
        self._readers.move_to_end(shard)
        return self._readers[shard]

    def _report(self, frame: _Frame, error: Exception) -> BadFrame:
        place = frame.place
        shard = str(self.sources[place.source][place.shard].shard)
        reader = self._readers.get((place.source, place.shard))
        key = reader.describe(place.row) if reader else f"row {place.row}"
        return BadFrame(frame.position, shard, key, reason_of(error))
