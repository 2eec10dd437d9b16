"""The data of `script/bench.py accuracy`: rendered hands of all poses, cropped once and kept on the device."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from script.benchmarks.measurement import Status
from src.batch import Batch
from src.config import Config
from src.data.demo.make import VERSION, make_demo_shards
from src.data.loader import build_train_loader, build_val_loader
from src.data.mean_hand import mean_of
from src.hand.mano import ManoLayer
from src.hand.skeleton import HandArrays
from src.metric import target_points
from src.train.validation import baseline_metrics

LOADED_TOGETHER = 125


def load_sets(cfg: Config, out: Path, status: Status) -> tuple[Batch, Batch]:
    """All training and validation samples, cropped, on the device: the comparison excludes data loading."""
    demo, root = cfg.DATA.demo, Path(cfg.DATA.root)
    number = {"train": demo.train_sample, "val": demo.val_sample}
    status("rendering hands")
    make_demo_shards(root, number, demo.seed, demo.img_size, demo.free_rotation)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    what = {"img_size": cfg.MODEL.img_size, "expansion_ratio": cfg.TRAIN.expansion_ratio}
    what |= {"demo": asdict(demo), "renderer": VERSION}
    file = out / f"patches-{digest_of(what)}.pt"
    if not file.is_file():
        status("cropping patches")
        loading = replace(cfg, TRAIN=replace(cfg.TRAIN, sample_per_device=LOADED_TOGETHER))
        loader = build_train_loader(loading, "standin", num_batch=-(-demo.train_sample // LOADED_TOGETHER))
        sets = [_tensors(loader), _tensors(build_val_loader(loading, "standin"))]
        partial = file.with_suffix(".part")
        torch.save(sets, partial)
        partial.rename(file)
    return tuple(_batch(tensors).to(device) for tensors in torch.load(file, weights_only=True))


def _tensors(loader: Any) -> dict[str, torch.Tensor]:
    """The tensors of all batches, concatenated, without padding rows."""
    parts = [{f.name: v for f in fields(b) if hasattr(v := getattr(b, f.name), "dtype")} for b in loader]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    real = joined["position"] >= 0
    return {name: value[real] for name, value in joined.items()}


def _batch(tensors: dict[str, torch.Tensor]) -> Batch:
    num = len(tensors["position"])
    return Batch(key=[""] * num, source=["demo"] * num, **tensors)


def rows_of(data: Batch, index: torch.Tensor) -> Batch:
    """The samples `index` [B] of a set."""
    names = ["demo"] * len(index)
    return replace(data.map(lambda t: t[index.to(t.device)]), key=names, source=names)


def baseline_errors(train: Batch, val: Batch, hand: HandArrays) -> dict[str, float]:
    """MPJPE (mm) of the image-independent baseline on the validation set, root-relative and after Procrustes alignment.
    A network that is not below it has learned nothing from the images."""
    layer, val = ManoLayer(hand), val.to("cpu")
    target_vert = layer(layer.pose_to_rotmat(val.mano_pose, val.flat_hand_mean), val.mano_shape).vert
    mean = mean_of(train.map(lambda t: t.cpu().numpy()), hand, train.patch.shape[-1])
    values = baseline_metrics(mean, val, target_points(val, target_vert))
    return {n: (v := values[f"{n}_mean_hand"]).total.sum() / v.count.sum() for n in ("mpjpe_rel", "mpjpe_pa")}


def digest_of(what: dict[str, Any]) -> str:
    """A name for a description: equal descriptions have equal names."""
    return blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()
