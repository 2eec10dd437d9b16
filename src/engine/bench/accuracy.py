"""`script/bench.py accuracy`: our decoder and losses against those of HaMeR and CS-ViT2, everything else equal.

Backbone (and its first weights), hand model, rendered training hands, their order, batch, steps, optimizer and schedule
are the same; decoder, losses and peak learning rate are each network's own. What is measured of a trained network (a
cell: method and seed) goes to `<out>/accuracy.json` at once: a bench that was ended goes on where it stopped.

Shapes: N samples of a set, B batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from src.batch import Batch, Prediction
from src.config import Config
from src.data.demo import make_demo_shards
from src.data.loader import build_train_loader, build_val_loader
from src.engine.bench.figure import Figure, machine
from src.engine.run_folder import write_text_atomic
from src.hand.load import load_hand
from src.loss import loss_counts, loss_sums, loss_weights, mean_terms
from src.metric import MetricAccumulator, evaluate_batch
from src.model.net import PoseNet
from src.utils.train_utils import get_lr_factor

METHODS = ("ours", "hamer", "csvit")
# Peak learning rates, the best of 2.5e-4, 5e-4, 1e-3 and 2e-3 for each (docs/ABLATIONS.md).
LEARNING_RATE = {"ours": 5e-4, "hamer": 5e-4, "csvit": 5e-4}
METRICS = ("mpjpe_rel", "mpjpe_pa", "mpjpe_cam")
MOST_OF_BETTER_PEER = {"mpjpe_rel": 0.85, "mpjpe_pa": 0.85, "mpjpe_cam": 0.7}
VAL_BATCH = 125
FULL = {"step": 2400, "train": 24000, "val": 1000, "seeds": [0, 1, 2]}
QUICK = {"step": 40, "train": 500, "val": 100, "seeds": [0]}


class Network(Protocol):
    """What the bench asks of a network."""

    def __call__(self, batch: Batch) -> Prediction: ...
    def training_loss(self, batch: Batch) -> torch.Tensor: ...


class OurNet(PoseNet):
    """PoseNet with the losses of the recipe, as `Trainer` takes them."""

    def __init__(self, cfg: Config, hand: Any) -> None:
        super().__init__(cfg.MODEL, hand)
        self.loss_weight = loss_weights(cfg.LOSS)

    def training_loss(self, batch: Batch) -> torch.Tensor:
        sums = loss_sums(self(batch), batch, self.hand).sum(0)
        return mean_terms(sums, loss_counts(batch).sum(0)) @ self.loss_weight.to(sums.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--quick", action="store_true", help="about a minute: says that it runs, not who is better")
    parser.add_argument("--out", type=Path, default=Path("checkpoint/bench-accuracy"), help="hands and results")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", nargs="+", type=int, help="default 0 1 2")
    parser.add_argument("--step", type=int, help=f"optimizer steps of each cell (default {FULL['step']})")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, help="peak learning rate, instead of each method's own")
    parser.add_argument("--backbone", default="tiny", help="a file of config/backbone, random weights (default tiny)")
    parser.add_argument("--img-size", type=int, default=70, help="patch side, px (default 70)")
    parser.add_argument("--name", default="", help="a name for this variant in the results")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for stage1, e.g. LOSS.lambda_seen=0")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> list[Figure]:
    """Train and measure what is missing; `say` is told what is going on."""
    size = QUICK if args.quick else FULL
    out = args.out / "quick" if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)
    step, seeds = args.step or size["step"], args.seed or size["seeds"]
    cfg = args.compose("stage1-demo", config_overrides(args, out, size, step))
    train, val = load_sets(cfg, out, say)
    cells = []
    for seed in seeds:
        for method in args.method:
            settings = cell_settings(cfg, method, seed, args.lr or LEARNING_RATE[method], args.name)
            cells.append(find_cell(out, settings) or make_cell(args, cfg, settings, train, val, out, say))
    return report(cells)


def config_overrides(args: argparse.Namespace, out: Path, size: dict[str, Any], step: int) -> list[str]:
    """Rendered hands of all poses, turned anywhere for a third, under occluders, before all cameras."""
    side = max(160, args.img_size + 90)  # a crop shows a part of the picture
    return [
        f"backbone={args.backbone}",
        "MODEL.backbone.random_init=true",
        f"MODEL.img_size={args.img_size}",
        f"DATA.root={out}/data-{side}",
        f"DATA.demo.train_sample={size['train']}",
        f"DATA.demo.val_sample={size['val']}",
        f"DATA.demo.img_size={side}",
        "DATA.demo.free_rotation=0.33",
        f"GENERAL.total_step={step}",
        f"GENERAL.warmup_step={step // 25}",
        f"GENERAL.dropout_warmup_step={step}",  # no dropout: nothing is overfitted in a run this short
        f"TRAIN.sample_per_device={args.batch}",
        *args.overrides,
    ]


# ---- data -----------------------------------------------------------------------------------------------------------


def load_sets(cfg: Config, out: Path, say: Callable[[str], None]) -> tuple[Batch, Batch]:
    """All training and validation samples, cropped, on the device: what is compared is not the reading."""
    demo, root = cfg.DATA.demo, Path(cfg.DATA.root)
    number = {"train": demo.train_sample, "val": demo.val_sample}
    say("rendering hands")
    make_demo_shards(root, number, demo.seed, demo.img_size, demo.free_rotation)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    what = {"img_size": cfg.MODEL.img_size, "expansion_ratio": cfg.TRAIN.expansion_ratio, **asdict(demo)}
    file = out / f"patches-{_digest(what)}.pt"
    if not file.is_file():
        say("cropping patches")
        loading = replace(cfg, TRAIN=replace(cfg.TRAIN, sample_per_device=VAL_BATCH))
        loader = build_train_loader(loading, "standin", num_batch=-(-demo.train_sample // VAL_BATCH))
        sets = [_tensors(loader), _tensors(build_val_loader(loading, "standin"))]
        partial = file.with_suffix(".part")
        torch.save(sets, partial)
        partial.rename(file)
    return tuple(_batch(tensors).to(device) for tensors in torch.load(file, weights_only=True))


def _tensors(loader: Any) -> dict[str, torch.Tensor]:
    """The tensors of all batches, one after the other; padding left out."""
    parts = [{f.name: v for f in fields(b) if hasattr(v := getattr(b, f.name), "dtype")} for b in loader]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    real = joined["position"] >= 0
    return {name: value[real] for name, value in joined.items()}


def _batch(tensors: dict[str, torch.Tensor]) -> Batch:
    num = len(tensors["position"])
    return Batch(key=[""] * num, source=["demo"] * num, **tensors)


def _rows(data: Batch, index: torch.Tensor) -> Batch:
    """The samples `index` [B] of a set."""
    names = ["demo"] * len(index)
    return replace(data._map(lambda t: t[index.to(t.device)]), key=names, source=names)


# ---- a cell ---------------------------------------------------------------------------------------------------------


def cell_settings(cfg: Config, method: str, seed: int, lr: float, name: str) -> dict[str, Any]:
    """All that decides a cell's result; cells of equal settings are equal."""
    model, general, train = asdict(cfg.MODEL), cfg.GENERAL, cfg.TRAIN
    settings = {
        "method": method,
        "seed": seed,
        "lr": lr,
        "name": name,
        "step": general.total_step,
        "warmup": general.warmup_step,
        "batch": train.sample_per_device,
        "weight_decay": train.weight_decay,
        "max_grad": train.max_grad,
        "expansion_ratio": train.expansion_ratio,
        "demo": asdict(cfg.DATA.demo),
        "backbone": model["backbone"],
        "img_size": model["img_size"],
        "dim": model["handec"]["dim"],
    }
    if method == "ours":
        settings |= {"model": model, "loss": asdict(cfg.LOSS)}
    return settings


def find_cell(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    return _read(out).get(_digest(settings))


def make_cell(
    args: argparse.Namespace,
    cfg: Config,
    settings: dict[str, Any],
    train: Batch,
    val: Batch,
    out: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train one network, measure it and write the result down."""
    method, seed = settings["method"], settings["seed"]
    torch.manual_seed(seed)
    hand = load_hand(cfg.MODEL.hand_model)
    net = OurNet(cfg, hand) if method == "ours" else args.peer(method)(cfg.MODEL, hand)
    net.to(train.patch.device)
    if hasattr(net, "fit"):
        net.fit(train)
    begin = time.perf_counter()
    train_network(net, cfg, settings, train, lambda step: say(f"{method}, seed {seed}: step {step}"))
    cell = {
        "settings": settings,
        "metrics": measure(net, val),
        "seconds": round(time.perf_counter() - begin, 1),
        "parameters": sum(p.numel() for p in net.parameters()),
        "machine": machine(),
    }
    write_text_atomic(out / "accuracy.json", json.dumps(_read(out) | {_digest(settings): cell}, indent=1) + "\n")
    return cell


def train_network(
    net: nn.Module, cfg: Config, settings: dict[str, Any], data: Batch, tell: Callable[[int], None]
) -> None:
    """AdamW with warm-up and cosine, as the training loop has it, over the set in an order that the seed gives."""
    general, batch, lr = cfg.GENERAL, cfg.TRAIN.sample_per_device, settings["lr"]
    groups = net.parameter_groups(lr, lr, cfg.TRAIN.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    parameters = [p for group in groups for p in group["params"]]
    order = torch.Generator().manual_seed(settings["seed"])
    index = torch.empty(0, dtype=torch.long)
    net.train().set_dropout_rate(0.0)
    for step in range(general.total_step):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * get_lr_factor(step, general.total_step, general.warmup_step)
        if len(index) < batch:
            index = torch.cat([index, torch.randperm(len(data), generator=order)])
        chosen, index = index[:batch], index[batch:]
        with torch.autocast("cuda", torch.bfloat16, enabled=data.patch.is_cuda):
            loss = net.training_loss(_rows(data, chosen))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.TRAIN.max_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            tell(step)


@torch.no_grad()
def measure(net: nn.Module, val: Batch) -> dict[str, float]:
    """The metrics of the validation sample, mm."""
    net.eval()
    gathered = MetricAccumulator()
    for index in torch.arange(len(val)).split(VAL_BATCH):
        batch = _rows(val, index)
        with torch.autocast("cuda", torch.bfloat16, enabled=val.patch.is_cuda):
            prediction = net(batch)
        target = net.hand(net.hand.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean), batch.mano_shape).vert
        gathered.update(batch.position.cpu().numpy(), batch.source, evaluate_batch(prediction, batch, target))
    return gathered.compute()


# ---- results --------------------------------------------------------------------------------------------------------


def report(cells: Sequence[dict[str, Any]]) -> list[Figure]:
    """Mean and spread of each method and metric over the seeds, and ours over the better peer."""
    value = {
        method: {m: [c["metrics"][m] for c in cells if c["settings"]["method"] == method] for m in METRICS}
        for method in METHODS
        if any(c["settings"]["method"] == method for c in cells)
    }
    figures = []
    for metric in METRICS:
        for method, of in value.items():
            spread = f"{min(of[metric]):.2f} to {max(of[metric]):.2f} over {len(of[metric])} seeds"
            if len(of[metric]) > 1:
                spread = f"sd {statistics.stdev(of[metric]):.2f}, {spread}"
            figures.append(Figure(f"{metric}, {method}", statistics.mean(of[metric]), "mm", note=spread))
        peers = {method: statistics.mean(of[metric]) for method, of in value.items() if method != "ours"}
        if peers and "ours" in value:
            better = min(peers, key=peers.__getitem__)
            ratio = statistics.mean(value["ours"][metric]) / peers[better]
            name = f"{metric}, ours over the better peer"
            figures.append(Figure(name, ratio, "", at_most=MOST_OF_BETTER_PEER[metric], note=better))
    return figures


def _read(out: Path) -> dict[str, Any]:
    file = out / "accuracy.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _digest(what: dict[str, Any]) -> str:
    return blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()
