"""One evaluation from checkpoint to folder: network and loader, collect, summarise, write, draw. Drives the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.progress import Progress

from src.config import Config
from src.data.demo.make import make_demo_data
from src.data.loader import HandLoader, build_val_loader
from src.distributed.processes import build_accelerator
from src.evaluate import hand_sheets as overlay
from src.evaluate import write as result
from src.evaluate.bootstrap import Bootstrap, Group, summarise
from src.evaluate.collect import Samples, collect
from src.evaluate.settings import source_labels
from src.evaluate.submission import write_submission
from src.model.net import PoseNet
from src.utils.console import logger, task_bar, track

UNKNOWN = "unknown"  # what a shard's hands are called that do not say which data set they are of
FREIHAND_IMAGES = 3960


@dataclass(frozen=True)
class Options:
    """What the command line asks for besides the configuration."""

    output: Path | None = None
    bootstrap: Bootstrap = Bootstrap()
    num_overlay: int = 16
    submission: str | None = None  # one of submission.CHALLENGES
    order: Sequence[str] | None = None  # names of its images
    half: str | None = None  # one of src.data.order.plan.HALVES: only those samples


@dataclass(frozen=True)
class Evaluation:
    """What came out."""

    folder: Path
    groups: list[Group]


def run_evaluation(checkpoint: Path, cfg: Config, options: Options, progress: Progress) -> Evaluation:
    """Evaluate the network of `checkpoint` on the validation frames of `cfg`.

    Raises:
        ValueError: about the checkpoint, the hand model, the shards, the output folder or the submission.
        BadDataError: more than `DATA.max_bad_fraction` of the frames are damaged.
    """
    accelerator = build_accelerator(cfg)
    net = PoseNet.from_checkpoint(checkpoint, hand_model=cfg.MODEL.hand_model, device=accelerator.device)
    assert net.saved is not None
    make_demo_data(cfg, progress, subsets=("val",))
    with task_bar(progress, "indexing shards") as advance:
        pin_memory = accelerator.device.type == "cuda"
        loader = build_val_loader(cfg, net.hand.name, half=options.half, progress=advance, pin_memory=pin_memory)
    logger.info(f"{net.saved.folder}, step {net.saved.step}; hand model {net.hand.name}; {accelerator.device.type}")
    output_root = Path(cfg.GENERAL.output_root)
    with result.new_folder(options.output, net.saved.folder, net.saved.step, output_root) as folder:
        batches = track(progress, loader, len(loader), "predicting")
        samples = collect(net, batches, accelerator, keep_hands=options.submission is not None)
        samples = name_unknown(samples, loader, cfg)
        if loader.health.counts():
            logger.warning(f"left out: {loader.health.summary()}")
        groups = summarise(samples, options.bootstrap)
        result.write_result(folder, _subject(net, cfg, loader, options.half), samples, groups, options.bootstrap)
        result.draw_plots(folder, groups[0])
        _, error = overlay.ranking(samples)
        for kind, rows in overlay.choose(error, options.num_overlay, options.bootstrap.seed).items():
            if len(rows):
                title = f"{kind} {len(rows)} of {len(samples)} hands"
                image = overlay.sheet(net, loader.dataset, accelerator, samples, rows, title)
                result.write_image(folder / f"{kind}.png", image)
        if options.submission is not None:
            _submit(folder, samples, net, options)
    return Evaluation(folder, groups)


def name_unknown(samples: Samples, loader: HandLoader, cfg: Config) -> Samples:
    """The samples with a data set for each: older shards do not name theirs, so the configuration does."""
    unknown = np.flatnonzero(samples.source == UNKNOWN)
    if not len(unknown):
        return samples
    labels, source = source_labels(cfg), samples.source.copy()
    plan, shards = loader.dataset.plan, loader.dataset.sources
    for row in unknown:
        place = plan.locate(int(samples.position[row]))
        source[row] = labels.get(Path(shards[place.source][place.shard].shard).absolute(), UNKNOWN)
    return replace(samples, source=source)


def _submit(folder: Path, samples: Samples, net: PoseNet, options: Options) -> None:
    assert options.submission is not None
    path = write_submission(options.submission, samples, folder, options.order)
    logger.info(f"submission: {path}, {len(options.order or samples.key)} images")
    if net.hand.name != "mano":
        logger.warning(f"the vertices in it are those of the hand {net.hand.name!r}; the challenge compares MANO's")
    if options.submission == "freihand" and len(samples) != FREIHAND_IMAGES:
        logger.warning(f"it holds {len(samples)} images; FreiHAND's evaluation split has {FREIHAND_IMAGES}")


def _subject(net: PoseNet, cfg: Config, loader: HandLoader, half: str | None) -> result.Subject:
    assert net.saved is not None
    return result.Subject(
        checkpoint=str(net.saved.folder),
        step=net.saved.step,
        hand_model=net.hand.name,
        data_root=str(cfg.DATA.root),
        data_source=cfg.DATA.val.source,
        stride=cfg.DATA.stride,
        max_sample=cfg.DATA.val.max_sample,
        val_seed=cfg.GENERAL.val_seed,
        half=half,
        unreadable=dict(loader.health.counts()),
    )
