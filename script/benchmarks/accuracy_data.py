"""The data of `script/bench.py accuracy`: rendered hands of all poses, cropped once and kept on the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

import torch
from rich.progress import Progress

from script.benchmarks.measurement import Status
from src.batch import Batch
from src.config import Config
from src.data.demo.make import make_demo_data
from src.data.loader import build_train_loader, build_val_loader
from src.data.mean_hand import HandLabels, mean_of
from src.hand.mano import ManoLayer
from src.hand.skeleton import HandArrays
from src.metric import target_points
from src.train.validation import baseline_metrics

LOADED_TOGETHER = 125


def load_sets(cfg: Config, status: Status) -> tuple[Batch, Batch]:
    """All training and validation samples, cropped, on the device: the comparison excludes data loading."""
    status("rendering hands")
    make_demo_data(cfg, Progress(disable=True))
    status("cropping patches")
    loading = replace(cfg, TRAIN=replace(cfg.TRAIN, sample_per_device=LOADED_TOGETHER))
    train = build_train_loader(loading, "standin", num_batch=-(-cfg.DATA.demo.train_sample // LOADED_TOGETHER))
    return _joined(train), _joined(build_val_loader(loading, "standin"))


def _joined(loader: Iterable[Batch]) -> Batch:
    """All batches as one, without padding rows, on the device."""
    batches = list(loader)
    names = [name for name, value in vars(batches[0]).items() if torch.is_tensor(value)]
    values = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    rows = rows_of(replace(batches[0], **values), (values["position"] >= 0).nonzero()[:, 0])
    return rows.to("cuda" if torch.cuda.is_available() else "cpu")


def rows_of(data: Batch, index: torch.Tensor) -> Batch:
    """The samples `index` [B] of a set."""
    names = ["demo"] * len(index)
    return replace(data.map(lambda t: t[index.to(t.device)]), key=names, source=names)


def baseline_errors(train: Batch, val: Batch, hand: HandArrays) -> dict[str, float]:
    """MPJPE (mm) of the image-independent baseline on the validation set, root-relative and after Procrustes alignment.
    A network that is not below it has learned nothing from the images."""
    labels = HandLabels(**{f.name: getattr(train, f.name).cpu().numpy() for f in fields(HandLabels)})
    layer, val = ManoLayer(hand), val.to("cpu")
    target_vert = layer(layer.pose_to_rotmat(val.mano_pose, val.flat_hand_mean), val.mano_shape).vert
    values = baseline_metrics(mean_of(labels, hand, train.patch.shape[-1]), val, target_points(val, target_vert))
    return {n: (v := values[f"{n}_mean_hand"]).total.sum() / v.count.sum() for n in ("mpjpe_rel", "mpjpe_pa")}
