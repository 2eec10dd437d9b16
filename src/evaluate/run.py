"""One evaluation, from the checkpoint to its output folder: predict, measure, summarise, write, draw.

Shape legend: B batch, N points (21 joints or V vertices).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.progress import Progress

from src.batch import Batch
from src.checkpoint.network import load_network
from src.config import Config
from src.data.demo.make import make_demo_data
from src.data.loader import HandLoader, build_val_loader
from src.data.plausibility.report import warn_if_implausible
from src.distributed.processes import build_accelerator
from src.evaluate import hand_sheets, write
from src.evaluate.bootstrap import Bootstrap, Group, summarise
from src.evaluate.plot import plot_joint_error, plot_pck
from src.evaluate.settings import source_labels
from src.evaluate.submission import write_submission
from src.hand.load import load_hand
from src.metric import Samples, measure
from src.model.net import PoseNet
from src.utils.console import logger, task_bar, track
from src.utils.files import encode_image, make_output

UNKNOWN = "unknown"  # data set of hands in shards that do not name theirs
FREIHAND_IMAGES = 3960


def run_evaluation(
    checkpoint: Path,
    cfg: Config,
    progress: Progress,
    *,
    output: Path | None,
    bootstrap: Bootstrap,
    num_overlay: int,
    submission: str | None,
    order: Sequence[str] | None,
    half: str | None,
) -> tuple[Path, list[Group]]:
    """Evaluate the network of `checkpoint` on the validation frames of `cfg`; returns the folder and the results.

    Args:
        output: a new folder; None: below the run folder or `GENERAL.output_root`.
        num_overlay: hands on each sheet.
        submission: "freihand", "ho3d" or None; order: the image names of the challenge.
        half: one of src.data.order.plan.HALVES; None: all samples.

    Raises:
        ValueError: a problem with the checkpoint, the hand model, the shards, the output folder or the submission.
        BadDataError: more than `DATA.max_bad_fraction` of the frames are corrupt.
    """
    accelerator = build_accelerator(cfg)
    hand = load_hand(cfg.MODEL.hand_model)
    loaded = load_network(checkpoint, hand_model=hand, device=accelerator.device)
    net = loaded.network
    make_demo_data(cfg, progress, subsets=("val",))
    with task_bar(progress, "indexing shards") as advance:
        pin_memory = accelerator.device.type == "cuda"
        loader = build_val_loader(cfg, net.hand.name, half=half, progress=advance, pin_memory=pin_memory)
    logger.info(f"{loaded.folder}, step {loaded.step}; hand model {net.hand.name}; {accelerator.device.type}")
    warn_if_implausible("evaluation", loader.dataset, {hand.name: hand})
    default = write.default_output(loaded.folder, loaded.step, half, Path(cfg.GENERAL.output_root))
    write.check_output(output, default)
    batches = track(progress, loader, len(loader), "predicting")
    samples = collect(net, batches, accelerator, keep_hands=submission is not None)
    samples = name_unknown(samples, loader, cfg)
    if loader.health.counts():
        logger.warning(f"skipped: {loader.health.summary()}")
    groups = summarise(samples, bootstrap)
    folder = make_output(output, default)
    subject = {
        "checkpoint": str(loaded.folder),
        "step": loaded.step,
        "hand_model": net.hand.name,
        "data_root": str(cfg.DATA.root),
        "data_source": cfg.DATA.val.source,
        "stride": cfg.DATA.stride,
        "max_sample": cfg.DATA.val.max_sample,
        "val_seed": cfg.GENERAL.val_seed,
        "half": half,
        "unreadable": dict(loader.health.counts()),  # reason -> number of skipped frames
    }
    write.write_result(folder, subject, samples, groups, bootstrap)
    plot_joint_error(groups[0], folder / "joint_error.png")
    plot_pck(groups[0], folder / "pck.png")
    _, error = hand_sheets.ranking(samples)
    for kind, rows in hand_sheets.choose(error, num_overlay, bootstrap.seed).items():
        if len(rows):
            title = f"{kind} {len(rows)} of {len(samples)} hands"
            image = hand_sheets.sheet(net, loader.dataset, accelerator, samples, rows, title)
            (folder / f"{kind}.png").write_bytes(encode_image(image, ".png"))
    if submission is not None:
        path = write_submission(submission, samples, folder, order)
        logger.info(f"submission: {path}, {len(order or samples.key)} images")
        if net.hand.name != "mano":
            logger.warning(f"its vertices are those of the hand model {net.hand.name!r}; the challenge expects MANO's")
        if submission == "freihand" and len(samples) != FREIHAND_IMAGES:
            logger.warning(f"it contains {len(samples)} images; FreiHAND's evaluation split has {FREIHAND_IMAGES}")
    return folder, groups


@torch.no_grad()
def collect(net: PoseNet, batches: Iterable[Batch], accelerator: Accelerator, keep_hands: bool = False) -> Samples:
    """Predict and measure every sample once.

    Args:
        net: in eval mode, on the accelerator's device.
        keep_hands: also keep the predicted joints and vertices in the cameras of the source images.

    Raises:
        ValueError: no frame of the data can be read.
    """
    parts = []
    for batch in batches:
        batch = batch.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            prediction = net(batch)
        target = net.hand(net.hand.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean), batch.mano_shape)
        hands = {}
        if keep_hands:
            hands = {name: to_source_camera(getattr(prediction, name), batch) for name in ("joint_cam", "vert_cam")}
        parts.append(Samples.of_batch(batch, measure(prediction, batch, target.vert), **hands))
    if not any(len(part) for part in parts):
        raise ValueError(
            "DATA.val.source: none of its frames can be read; script/check_shards.py lists what is corrupt"
        )
    return Samples.join(parts)


def to_source_camera(point: torch.Tensor, batch: Batch) -> np.ndarray:
    """Map points from the patch camera, where every hand is a right hand, to the source camera and the original side.

    Args: point [B, N, 3] mm. Returns: [B, N, 3] mm float64.
    """
    rotation = batch.cam_rot.double().cpu().numpy()  # x_patch = R x, so with rows x = x_patch R
    turned = point.double().cpu().numpy() @ rotation
    turned[:, :, 0] *= np.where(batch.is_right.cpu().numpy(), 1.0, -1.0)[:, None]
    return turned


def name_unknown(samples: Samples, loader: HandLoader, cfg: Config) -> Samples:
    """Name the data set of samples from older shards, which do not name it, after their source in the configuration."""
    labels, source = source_labels(cfg), samples.source.copy()
    plan, shards = loader.dataset.plan, loader.dataset.sources
    for row in np.flatnonzero(source == UNKNOWN):
        place = plan.locate(int(samples.position[row]))
        source[row] = labels.get(Path(shards[place.source][place.shard].shard).absolute(), UNKNOWN)
    return replace(samples, source=source)
