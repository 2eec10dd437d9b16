"""One evaluation, from the checkpoint to its output folder: predict, measure, summarise, write, draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.progress import Progress

from src.checkpoint.network import LoadedNetwork, load_network
from src.config import Config
from src.data.demo.make import make_demo_data
from src.data.loader import HandLoader, build_val_loader
from src.distributed.processes import build_accelerator
from src.evaluate import hand_sheets, write
from src.evaluate.bootstrap import Bootstrap, Group, summarise
from src.evaluate.collect import collect
from src.evaluate.settings import source_labels
from src.evaluate.submission import write_submission
from src.metric import Samples
from src.utils.console import logger, task_bar, track

UNKNOWN = "unknown"  # data set of hands in shards that do not name theirs
FREIHAND_IMAGES = 3960


@dataclass(frozen=True)
class Options:
    """The command line's options besides the configuration."""

    output: Path | None = None
    bootstrap: Bootstrap = Bootstrap()
    num_overlay: int = 16
    submission: str | None = None  # one of submission.CHALLENGES
    order: Sequence[str] | None = None  # the challenge's image names
    half: str | None = None  # one of src.data.order.plan.HALVES; None: all samples


@dataclass(frozen=True)
class Evaluation:
    """The output of an evaluation."""

    folder: Path
    groups: list[Group]


def run_evaluation(checkpoint: Path, cfg: Config, options: Options, progress: Progress) -> Evaluation:
    """Evaluate the network of `checkpoint` on the validation frames of `cfg`.

    Raises:
        ValueError: a problem with the checkpoint, the hand model, the shards, the output folder or the submission.
        BadDataError: more than `DATA.max_bad_fraction` of the frames are corrupt.
    """
    accelerator = build_accelerator(cfg)
    loaded = load_network(checkpoint, hand_model=cfg.MODEL.hand_model, device=accelerator.device)
    net = loaded.network
    make_demo_data(cfg, progress, subsets=("val",))
    with task_bar(progress, "indexing shards") as advance:
        pin_memory = accelerator.device.type == "cuda"
        loader = build_val_loader(cfg, net.hand.name, half=options.half, progress=advance, pin_memory=pin_memory)
    logger.info(f"{loaded.folder}, step {loaded.step}; hand model {net.hand.name}; {accelerator.device.type}")
    default = write.default_output(loaded.folder, loaded.step, options.half, Path(cfg.GENERAL.output_root))
    write.check_output(options.output, default)
    batches = track(progress, loader, len(loader), "predicting")
    samples = collect(net, batches, accelerator, keep_hands=options.submission is not None)
    samples = name_unknown(samples, loader, cfg)
    if loader.health.counts():
        logger.warning(f"skipped: {loader.health.summary()}")
    groups = summarise(samples, options.bootstrap)
    folder = write.make_output(options.output, default)
    write.write_result(folder, _subject(loaded, cfg, loader, options.half), samples, groups, options.bootstrap)
    write.draw_plots(folder, groups[0])
    _, error = hand_sheets.ranking(samples)
    for kind, rows in hand_sheets.choose(error, options.num_overlay, options.bootstrap.seed).items():
        if len(rows):
            title = f"{kind} {len(rows)} of {len(samples)} hands"
            image = hand_sheets.sheet(net, loader.dataset, accelerator, samples, rows, title)
            write.write_image(folder / f"{kind}.png", image)
    if options.submission is not None:
        _submit(folder, samples, net.hand.name, options)
    return Evaluation(folder, groups)


def name_unknown(samples: Samples, loader: HandLoader, cfg: Config) -> Samples:
    """Name the data set of samples from older shards, which do not name it, after their source in the configuration."""
    unknown = np.flatnonzero(samples.source == UNKNOWN)
    if not len(unknown):
        return samples
    labels, source = source_labels(cfg), samples.source.copy()
    plan, shards = loader.dataset.plan, loader.dataset.sources
    for row in unknown:
        place = plan.locate(int(samples.position[row]))
        source[row] = labels.get(Path(shards[place.source][place.shard].shard).absolute(), UNKNOWN)
    return replace(samples, source=source)


def _submit(folder: Path, samples: Samples, hand_model: str, options: Options) -> None:
    assert options.submission is not None
    path = write_submission(options.submission, samples, folder, options.order)
    logger.info(f"submission: {path}, {len(options.order or samples.key)} images")
    if hand_model != "mano":
        logger.warning(f"its vertices are those of the hand model {hand_model!r}; the challenge expects MANO's")
    if options.submission == "freihand" and len(samples) != FREIHAND_IMAGES:
        logger.warning(f"it contains {len(samples)} images; FreiHAND's evaluation split has {FREIHAND_IMAGES}")


def _subject(loaded: LoadedNetwork, cfg: Config, loader: HandLoader, half: str | None) -> write.Subject:
    return write.Subject(
        checkpoint=str(loaded.folder),
        step=loaded.step,
        hand_model=loaded.network.hand.name,
        data_root=str(cfg.DATA.root),
        data_source=cfg.DATA.val.source,
        stride=cfg.DATA.stride,
        max_sample=cfg.DATA.val.max_sample,
        val_seed=cfg.GENERAL.val_seed,
        half=half,
        unreadable=dict(loader.health.counts()),
    )
