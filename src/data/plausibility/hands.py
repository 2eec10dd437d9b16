"""A sample of a data set's annotations as arrays, read from shards without decoding images.

Shape legend: N hands, J = 21 joints.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from src.data.image import image_info
from src.data.shards.annotation import Clip
from src.data.shards.errors import SampleError
from src.data.shards.index import ShardIndex
from src.data.shards.reader import ShardReader
from src.hand.skeleton import NUM_MANO_JOINT

UNNAMED = "unknown"  # Clip.source of shards that do not name their data set
_UNKNOWN = np.full((NUM_MANO_JOINT, 3), np.nan)
_HEAD_SIZE = 2048  # bytes of an encoded image in which its size is looked for


@dataclass(frozen=True, eq=False)
class Hands:
    """The annotations of N hands, as in Clip; floats are float64, flags bool."""

    place: np.ndarray  # [N, 2] int: shard, row of its reader
    source: np.ndarray  # [N] data set, or the folder of the shard if it does not name one
    hand_model: np.ndarray  # [N] str
    is_right: np.ndarray  # [N]
    flat_hand_mean: np.ndarray  # [N]
    image_size: np.ndarray  # [N, 2] px; 0 where unknown
    hand_bbox: np.ndarray  # [N, 4] xyxy px
    joint_img: np.ndarray  # [N, J, 2] px
    joint_2d_valid: np.ndarray  # [N, J]
    joint_cam: np.ndarray  # [N, J, 3] mm
    joint_3d_valid: np.ndarray  # [N, J]
    mano_pose: np.ndarray  # [N, 48]
    mano_shape: np.ndarray  # [N, 10]
    has_mano: np.ndarray  # [N]
    focal: np.ndarray  # [N, 2] px
    princpt: np.ndarray  # [N, 2] px
    has_intr: np.ndarray  # [N]
    posed: np.ndarray  # [N, 16, 3] mm about the wrist, CHAIN_JOINTS of the MANO parameters; NaN where unknown

    def __len__(self) -> int:
        return len(self.source)

    def select(self, rows: np.ndarray) -> Hands:
        """The hands of these rows (indices or a mask)."""
        return Hands(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


_FLAGS = frozenset({"joint_2d_valid", "joint_3d_valid", "has_mano", "has_intr"})
_PER_FRAME = tuple(field.name for field in fields(Hands))[6:-1]


def read_hands(shards: Sequence[ShardIndex], rows: Sequence[Sequence[int]], stride: int = 1) -> Hands | None:
    """The hands at `rows` of each shard; None if none can be read. Unreadable frames are skipped: they are reported
    as corrupt elsewhere.

    Args: rows: for each shard, rows among those that `stride` selects.
    """
    columns: dict[str, list] = defaultdict(list)
    for number, (shard, some) in enumerate(zip(shards, rows, strict=True)):
        if len(some):
            _read_shard(columns, number, shard, some, stride)
    if not columns:
        return None
    return Hands(**{name: np.array(values) for name, values in columns.items()})


def _read_shard(columns: dict[str, list], number: int, shard: ShardIndex, rows: Iterable[int], stride: int) -> None:
    """Append the hands at `rows` of one shard to the columns of a Hands."""
    try:
        reader = ShardReader(shard, stride)
    except OSError:
        return
    folder = str(Path(shard.shard).parent)
    for row in rows:
        try:
            clip, frame = reader.annotation(row)
            size = _image_size(reader.image_head(row, _HEAD_SIZE))
        except (SampleError, OSError, ValueError, ArithmeticError):
            continue
        _append(columns, clip, frame)
        columns["place"].append((number, row))
        columns["source"].append(folder if clip.source == UNNAMED else clip.source)
        columns["image_size"].append(size)
        columns["posed"].append(_UNKNOWN)
    reader.close()


def _append(columns: dict[str, list], clip: Clip, frame: int) -> None:
    """Append one frame of a clip; copies, so that long clips are not kept in memory."""
    columns["hand_model"].append(clip.hand_model)
    columns["is_right"].append(clip.is_right)
    columns["flat_hand_mean"].append(clip.flat_hand_mean)
    for name in _PER_FRAME:
        value = getattr(clip, name)[frame]
        columns[name].append(value > 0 if name in _FLAGS else value.astype(np.float64))


def _image_size(head: bytes) -> tuple[int, int]:
    try:
        return image_info(head)[1]
    except SampleError:
        return 0, 0  # not in the first bytes


def spread_rows(num_frame: int, most: int) -> list[int]:
    """At most `most` rows, evenly spaced over the frames of a shard."""
    return np.unique(np.linspace(0, num_frame - 1, min(most, num_frame)).round().astype(int)).tolist()
