"""Predict a list of images: read ahead, batch the hands, write the files; unreadable images are skipped."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from src.predict.boxes import HandBox
from src.predict.outputs import Outputs
from src.predict.photo import Camera, Photo, PhotoError, read_photo
from src.predict.predictor import Predictor, box_problem, whole_image_box
from src.predict.write import write_prediction

_AHEAD = 4  # images that are decoded while the network works


@dataclass(frozen=True)
class Options:
    """The options of the command line, for every image; None is not given."""

    is_right: bool | None = None
    focal: tuple[float, float] | None = None  # px
    princpt: tuple[float, float] | None = None  # px
    sensor_width: float | None = None  # mm
    batch_size: int = 16
    kinds: frozenset[str] = frozenset()  # of outputs.KINDS


@dataclass
class Summary:
    """Counts for the lines at the end."""

    num_photo: int = 0
    num_hand: int = 0
    cameras: Counter[str] = field(default_factory=Counter)  # hands by the source of their camera
    assumed_right: int = 0  # hands whose side was not given
    no_box: list[Path] = field(default_factory=list)  # images that the boxes file does not list
    skipped: list[tuple[Path, str]] = field(default_factory=list)  # with the reason

    def lines(self, folder: Path, unknown: Sequence[str], num_finished: int) -> Iterator[str]:
        """The lines to print. `unknown`: images in the boxes file that do not exist; `num_finished`: done earlier."""
        for source, number in self.cameras.most_common():
            yield f"camera of {_count(number, 'hand')} from {source}"
        if self.assumed_right:
            yield f"{_count(self.assumed_right, 'hand')} assumed to be right; use --handedness or the boxes file"
        if self.no_box:
            yield f"no box for {_count(len(self.no_box), 'image')}, e.g. {self.no_box[0]}"
        if unknown:
            yield f"in the boxes file but not found: {_count(len(unknown), 'image')}, e.g. {unknown[0]}"
        if num_finished:
            yield f"{_count(num_finished, 'image')} predicted earlier"
        done = f"{_count(self.num_hand, 'hand')} in {_count(self.num_photo, 'image')} predicted"
        yield f"{done}, {len(self.skipped)} skipped; written to {folder}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True)
class _Hand:
    """One hand to predict, with box, side and camera resolved."""

    box: np.ndarray  # [4] px
    is_right: bool
    camera: Camera
    is_side_known: bool


def predict_photos(
    predictor: Predictor,
    photos: Sequence[Path],
    boxes: Mapping[Path, Sequence[HandBox]] | None,
    outputs: Mapping[Path, Outputs],
    options: Options,
    progress: Callable[[Path, str | None], None] = lambda path, problem: None,
) -> Summary:
    """Predict every image and write its files.

    Args:
        boxes: hands of each image; None: each image is a crop of one hand.
        progress: called after each image, with the reason if it was skipped.
    """
    summary, pending = Summary(), []
    wanted = [photo for photo in photos if boxes is None or boxes[photo]]
    summary.no_box = [photo for photo in photos if photo not in set(wanted)]
    with ThreadPoolExecutor(2) as pool:
        for path, photo in _read_ahead(pool, wanted, options.sensor_width):
            try:
                wanted_hands = [HandBox(None)] if boxes is None else boxes[path]
                hands = [_resolve(photo.result(), hand, options, predictor.loaded.crop) for hand in wanted_hands]
            except PhotoError as error:
                summary.skipped.append((path, str(error)))
                progress(path, str(error))
                continue
            pending.append((photo.result(), hands))
            if sum(len(hands) for _, hands in pending) >= options.batch_size:
                _predict(predictor, pending, outputs, options, summary, pool, progress)
                pending = []
        _predict(predictor, pending, outputs, options, summary, pool, progress)
    return summary


def _read_ahead(
    pool: ThreadPoolExecutor, paths: Sequence[Path], sensor_width: float | None
) -> Iterator[tuple[Path, Future[Photo]]]:
    """Images in order, decoded a few ahead by the pool."""
    ahead: deque[tuple[Path, Future[Photo]]] = deque()
    for path in paths:
        ahead.append((path, pool.submit(read_photo, path, sensor_width)))
        if len(ahead) > _AHEAD:
            yield ahead.popleft()
    while ahead:
        yield ahead.popleft()


def _resolve(photo: Photo, hand: HandBox, options: Options, crop: float) -> _Hand:
    """Box, side and camera of one hand. Precedence: command line, boxes file, the image itself."""
    height, width = photo.image.shape[:2]
    box = whole_image_box(width, height, crop) if hand.box is None else np.array(hand.box)
    if problem := box_problem(box, width, height):
        raise PhotoError(problem)
    side = options.is_right if options.is_right is not None else hand.is_right
    focal, source = photo.camera.focal, photo.camera.source
    for value, where in ((hand.focal, "the boxes file"), (options.focal, "the command line")):
        focal, source = (focal, source) if value is None else (value, where)
    princpt = options.princpt or hand.princpt or photo.camera.princpt
    return _Hand(box, side is not False, Camera(focal, princpt, source), side is not None)


def _predict(
    predictor: Predictor,
    pending: Sequence[tuple[Photo, list[_Hand]]],
    outputs: Mapping[Path, Outputs],
    options: Options,
    summary: Summary,
    pool: ThreadPoolExecutor,
    progress: Callable[[Path, str | None], None],
) -> None:
    """Predict the pending hands and write the files of their images."""
    flat = [(number, photo, hand) for number, (photo, hands) in enumerate(pending) for hand in hands]
    if not flat:
        return
    found = predictor.predict(
        [photo.image for _, photo, _ in flat],
        [hand.box for _, _, hand in flat],
        np.array([hand.camera.focal for _, _, hand in flat]),
        np.array([hand.camera.princpt for _, _, hand in flat]),
        [hand.is_right for _, _, hand in flat],
        options.batch_size,
    )
    owner = np.array([number for number, _, _ in flat])

    def write(number: int) -> Path:
        photo, hands = pending[number]
        each = [{"camera_from": h.camera.source, "handedness_known": h.is_side_known} for h in hands]
        record = {
            "image": str(photo.path),
            "image_wh": list(photo.image.shape[1::-1]),
            "checkpoint": str(predictor.loaded.folder),
            "step": predictor.loaded.step,
            "hand_model": predictor.loaded.network.hand.name,
            "flat_hand_mean": True,
        }
        mine = found.select(owner == number)
        write_prediction(outputs[photo.path], photo.image, mine, record, each, options.kinds)
        return photo.path

    for path in pool.map(write, range(len(pending))):
        progress(path, None)
    summary.num_photo += len(pending)
    summary.num_hand += len(flat)
    summary.cameras.update(hand.camera.source for _, _, hand in flat)
    summary.assumed_right += sum(not hand.is_side_known for _, _, hand in flat)
