"""Predicts a list of photographs: reads ahead, fills batches with hands, writes; tells and skips damaged pictures."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from src.model.net import PoseNet
from src.predict.boxes import HandBox
from src.predict.outputs import Outputs
from src.predict.photo import Camera, Photo, PhotoError, read_photo
from src.predict.predictor import box_problem, whole_image_box
from src.predict.write import write_prediction

_AHEAD = 4  # pictures that are decoded while the network works


@dataclass(frozen=True)
class Given:
    """What the command line says about every picture; None is not said."""

    is_right: bool | None = None
    focal: tuple[float, float] | None = None  # px
    princpt: tuple[float, float] | None = None  # px
    sensor_width: float | None = None  # mm
    batch_size: int = 16
    kinds: frozenset[str] = frozenset()  # of outputs.KINDS


@dataclass
class Tally:
    """How it went."""

    num_photo: int = 0
    num_hand: int = 0
    cameras: Counter[str] = field(default_factory=Counter)  # hands by where their camera is known from
    assumed_right: int = 0  # hands of which nothing said the side
    whole_image: int = 0  # images without a box, taken as a crop of one hand
    no_box: list[Path] = field(default_factory=list)  # pictures that the boxes file does not name
    skipped: list[tuple[Path, str]] = field(default_factory=list)  # with the reason

    def lines(self, folder: Path, strangers: Sequence[str], num_finished: int) -> Iterator[str]:
        """What to tell a person at the end. strangers: images of the boxes file that were not there; num_finished:
        pictures that were done before."""
        for source, number in self.cameras.most_common():
            yield f"camera of {_count(number, 'hand')} from {source}"
        if self.assumed_right:
            yield f"{_count(self.assumed_right, 'hand')} taken for right; --handedness or the boxes file can tell"
        if self.whole_image:
            images = _count(self.whole_image, "image")
            taken = f"the whole of {images} was taken as the crop of one hand each"
            yield f"no --boxes: {taken}; where a hand is small in it, give --boxes"
        if self.no_box:
            yield f"no box for {_count(len(self.no_box), 'picture')}, e.g. {self.no_box[0]}"
        if strangers:
            yield f"not there, but in the boxes file: {_count(len(strangers), 'picture')}, e.g. {strangers[0]}"
        if num_finished:
            yield f"{_count(num_finished, 'picture')} done before"
        done = f"{_count(self.num_hand, 'hand')} in {_count(self.num_photo, 'picture')} predicted"
        yield f"{done}, {len(self.skipped)} skipped: {folder}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True)
class _Hand:
    """One hand to predict, everything settled."""

    box: np.ndarray  # [4] px
    is_right: bool
    camera: Camera
    is_side_known: bool
    is_whole: bool  # the box is the whole image


def predict_photos(
    net: PoseNet,
    photos: Sequence[Path],
    boxes: Mapping[Path, Sequence[HandBox]] | None,
    outputs: Mapping[Path, Outputs],
    given: Given,
    progress: Callable[[Path, str | None], None] = lambda path, problem: None,
) -> Tally:
    """Predict and write every photograph.

    Args:
        boxes: hands of each photograph; None: each photograph is a crop of one hand.
        progress: told each photograph that is done, with the reason if it was skipped.
    """
    tally, waiting = Tally(), []
    wanted = [photo for photo in photos if boxes is None or boxes[photo]]
    tally.no_box = [photo for photo in photos if photo not in set(wanted)]
    with ThreadPoolExecutor(2) as pool:
        for path, photo in _read_ahead(pool, wanted, lambda path: read_photo(path, given.sensor_width)):
            try:
                if isinstance(photo, PhotoError):
                    raise photo
                asked = [HandBox(None)] if boxes is None else boxes[path]
                hands = [_settle(photo, hand, given, net) for hand in asked]
            except PhotoError as error:
                tally.skipped.append((path, str(error)))
                progress(path, str(error))
                continue
            waiting.append((photo, hands))
            if sum(len(hands) for _, hands in waiting) >= given.batch_size:
                _predict(net, waiting, outputs, given, tally, pool, progress)
                waiting = []
        _predict(net, waiting, outputs, given, tally, pool, progress)
    return tally


def _read_ahead(
    pool: ThreadPoolExecutor, paths: Iterable[Path], read: Callable[[Path], Photo]
) -> Iterator[tuple[Path, Photo | PhotoError]]:
    """Pictures in order, decoded by the pool a few ahead."""
    ahead: deque[tuple[Path, Future[Photo]]] = deque()

    def take() -> tuple[Path, Photo | PhotoError]:
        path, future = ahead.popleft()
        try:
            return path, future.result()
        except PhotoError as error:
            return path, error

    for path in paths:
        ahead.append((path, pool.submit(read, path)))
        if len(ahead) > _AHEAD:
            yield take()
    while ahead:
        yield take()


def _settle(photo: Photo, hand: HandBox, given: Given, net: PoseNet) -> _Hand:
    """Box, side and camera of one hand: the command line before the boxes file before the picture itself."""
    height, width = photo.image.shape[:2]
    whole = hand.box is None
    box = whole_image_box(width, height, net.saved.expansion_ratio) if whole else np.array(hand.box)
    if problem := box_problem(box, width, height):
        raise PhotoError(problem)
    side = given.is_right if given.is_right is not None else hand.is_right
    focal, source = photo.camera.focal, photo.camera.source
    for value, where in ((hand.focal, "the boxes file"), (given.focal, "the command line")):
        focal, source = (focal, source) if value is None else (value, where)
    princpt = given.princpt or hand.princpt or photo.camera.princpt
    return _Hand(box, side is not False, Camera(focal, princpt, source), side is not None, whole)


def _predict(
    net: PoseNet,
    waiting: Sequence[tuple[Photo, list[_Hand]]],
    outputs: Mapping[Path, Outputs],
    given: Given,
    tally: Tally,
    pool: ThreadPoolExecutor,
    progress: Callable[[Path, str | None], None],
) -> None:
    """Run the network over the hands that wait, and write their photographs."""
    flat = [(number, photo, hand) for number, (photo, hands) in enumerate(waiting) for hand in hands]
    if not flat:
        return
    found = net.predict(
        [photo.image for _, photo, _ in flat],
        [hand.box for _, _, hand in flat],
        np.array([hand.camera.focal for _, _, hand in flat]),
        np.array([hand.camera.princpt for _, _, hand in flat]),
        [hand.is_right for _, _, hand in flat],
        given.batch_size,
    )
    owner = np.array([number for number, _, _ in flat])

    def write(number: int) -> Path:
        photo, hands = waiting[number]
        each = [{"camera_from": h.camera.source, "handedness_known": h.is_side_known} for h in hands]
        record = {
            "image": str(photo.path),
            "image_wh": list(photo.image.shape[1::-1]),
            "checkpoint": str(net.saved.folder),
            "step": net.saved.step,
            "hand_model": net.hand.name,
            "flat_hand_mean": True,
        }
        mine = found.select(owner == number)
        write_prediction(outputs[photo.path], photo.image, mine, record, each, given.kinds)
        return photo.path

    for path in pool.map(write, range(len(waiting))):
        progress(path, None)
    tally.num_photo += len(waiting)
    tally.num_hand += len(flat)
    tally.cameras.update(hand.camera.source for _, _, hand in flat)
    tally.whole_image += sum(hand.is_whole for _, _, hand in flat)
    tally.assumed_right += sum(not hand.is_side_known for _, _, hand in flat)
