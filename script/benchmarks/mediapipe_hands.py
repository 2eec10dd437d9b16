"""`script/bench.py mediapipe`: MediaPipe Hands on the hands of script/evaluate.py, with the same metrics.

MediaPipe gets one whole source image at a time (no tracking). The detection nearest to the annotated joints counts. A
hand without a detection counts as wrong in 2D PCK and is excluded from PA-MPJPE. MediaPipe needs its own environment;
docs/EVALUATION.md describes the installation.

Shapes: D detections in an image, J = 21 joints (MediaPipe's order is ours).
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from script.benchmarks.measurement import Figure, Status, compose_config
from src.batch import NUM_JOINT, Sample
from src.data.loader import build_val_loader
from src.data.order.plan import HALVES
from src.evaluate.bootstrap import Bootstrap, Group, summarise
from src.evaluate.run import name_unknown
from src.metric import (
    PCK_2D,
    UNITS,
    SampleMetric,
    Samples,
    align_procrustes,
    alignment_target,
    box_side,
    box_target,
    compare,
)

VERSION = "0.10.14"
INSTALL = f"python3.11 -m venv mediapipe-venv && mediapipe-venv/bin/pip install -e . mediapipe=={VERSION}"
MAX_DISTANCE = 1.0  # largest mean joint distance, in box sides, at which a detection is the annotated hand
SHOWN = ("found", *PCK_2D, "auc_2d", "mpjpe_pa")


class Detection(NamedTuple):
    """A hand that MediaPipe detected."""

    joint_img: np.ndarray  # [J, 2] px of the source image
    joint_world: np.ndarray  # [J, 3] mm, relative to the hand's centre; axes as in our camera frame


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for evaluate: DATA.root=data ...")
    parser.add_argument("--half", choices=HALVES, help="only this half of the samples, as in evaluate.py")
    parser.add_argument("--num_bootstrap", type=int, default=1000, help="draws; default: %(default)s")
    parser.add_argument("--resample", choices=("sample", "clip"), default="sample", help="what is resampled")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--confidence", type=float, default=0.5, help="min_detection_confidence; default: %(default)s")
    parser.add_argument("--pad", type=float, default=0.0, help="black border, share of the longer side of the image")


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Detect, match and measure every hand."""
    detect = load_detector(args.confidence, args.pad)
    cfg = compose_config("stage1-demo", "DATA.demo=null", "DATA.val.max_sample=null", *args.overrides)
    loader = build_val_loader(cfg, "standin", half=args.half)
    dataset, hands = loader.dataset, []
    for batch in loader:
        for position in batch.position[batch.position >= 0].tolist():
            sample = dataset.read(dataset.plan.locate(position))
            values = measure_hand(sample, detect(sample.image))
            names = (np.array([name], dtype=object) for name in (sample.key, sample.source))
            hands.append(Samples(np.array([position]), *names, np.array([sample.is_right]), values))
            status(f"{len(hands)} of {dataset.plan.num_frame} hands")
    samples = name_unknown(Samples.join(hands), loader, cfg)
    groups = summarise(samples, Bootstrap(args.num_bootstrap, args.resample, args.seed))
    return [figure for group in groups for figure in group_figures(group)]


def load_detector(confidence: float, pad: float) -> Callable[[np.ndarray], Sequence[Detection]]:
    """MediaPipe Hands for single images. Raises SystemExit if it is not installed."""
    try:
        mediapipe = importlib.import_module("mediapipe")
    except ImportError as error:
        raise SystemExit(f"bench mediapipe: {error}. Install it into its own environment: {INSTALL}") from error
    hands = mediapipe.solutions.hands.Hands(
        static_image_mode=True, max_num_hands=2, min_detection_confidence=confidence
    )

    def detect(image: np.ndarray) -> list[Detection]:
        border = round(pad * max(image.shape[:2]))
        padded = cv2.copyMakeBorder(image, border, border, border, border, cv2.BORDER_CONSTANT)
        result = hands.process(padded)
        size = np.array(padded.shape[1::-1])
        pairs = zip(result.multi_hand_landmarks or (), result.multi_hand_world_landmarks or (), strict=True)
        # Landmarks are fractions of the image, corner to corner; our pixel centres are at integers.
        return [Detection(_points(img)[:, :2] * size - 0.5 - border, 1000 * _points(world)) for img, world in pairs]

    return detect


def _points(landmarks: Any) -> np.ndarray:
    """MediaPipe's list of landmarks as [J, 3]."""
    return np.array([(point.x, point.y, point.z) for point in landmarks.landmark], np.float64)


def match(sample: Sample, detections: Iterable[Detection]) -> Detection | None:
    """The detection with the smallest mean distance to the annotated joints, whatever its handedness; None if that is
    more than MAX_DISTANCE."""
    valid = sample.joint_2d_valid > 0
    if not valid.any():
        return None

    def distance(detection: Detection) -> float:
        return float(np.linalg.norm(detection.joint_img[valid] - sample.joint_img[valid], axis=-1).mean())

    side = box_side(sample.joint_img[None], valid[None])[0]
    best = min(detections, key=distance, default=None)
    return best if best is not None and distance(best) <= MAX_DISTANCE * side else None


def measure_hand(sample: Sample, detections: Iterable[Detection]) -> dict[str, SampleMetric]:
    """The metrics of SHOWN and the PCK curve for one hand (B = 1)."""
    found = match(sample, detections)
    joint_img = np.full((NUM_JOINT, 2), np.inf) if found is None else found.joint_img
    joint_world = np.zeros((NUM_JOINT, 3)) if found is None else found.joint_world
    valid_2d, valid_3d = sample.joint_2d_valid[None] > 0, sample.joint_3d_valid[None] > 0
    image = box_target(sample.joint_img[None].astype(np.float64), valid_2d)
    world = alignment_target(sample.joint_cam[None].astype(np.float64), valid_3d & (found is not None))
    target = {"joint_2d": image, "joint_pa": world}
    pred = {"joint_2d": joint_img[None], "joint_pa": align_procrustes(joint_world[None], world.point, world.valid)}
    values = {
        "found": SampleMetric(np.array([float(found is not None)]), np.array([float(image.valid.any())])),
        **compare(pred, target, (*PCK_2D, "auc_2d", "curve_2d", "mpjpe_pa")),
    }
    return {name: SampleMetric(*(part.reshape(1, -1) for part in value)) for name, value in values.items()}


def group_figures(group: Group) -> list[Figure]:
    """One figure for each metric of a group; the note has the interval and the number of hands with this metric."""
    figures = []
    for name in SHOWN:
        if (estimate := group.metric.get(name)) is None:
            continue
        unit = "%" if name == "found" else UNITS.get(name, "")
        scale = 100.0 if unit == "%" else 1.0
        interval = "" if estimate.low is None else f"[{scale * estimate.low:.4g}, {scale * estimate.high:.4g}] "
        note = f"{interval}of {estimate.num_sample} hands"
        label = group.name if group.kind == "all" else f"{group.kind} {group.name}"
        figures.append(Figure(f"{label}: {name}", scale * estimate.value, unit, note=note))
    return figures
