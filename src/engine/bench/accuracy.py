"""`script/bench.py accuracy`: our decoder and losses against those of HaMeR and CS-ViT2, everything else equal.

Backbone and its first weights, hand model, rendered training hands, their order, batch, steps, optimizer and schedule
are the same; decoder, losses and peak learning rate are each network's own. The backbone has first learned to locate
the joints in the patch: both peers start from pre-trained backbones, HaMeR's from one trained on 2D keypoints. What is
measured of a trained network (a cell: method and seed) goes to `<out>/accuracy.json` at once: a bench that was ended
goes on where it stopped.

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
from src.model.backbone import Backbone
from src.model.heads import KeypointHead
from src.model.net import PoseNet
from src.utils.train_utils import get_lr_factor

METHODS = ("ours", "hamer", "csvit")
# Peak learning rates, the best of 2.5e-4, 5e-4, 1e-3 and 2e-3 for each (docs/ABLATIONS.md).
LEARNING_RATE = {"ours": 5e-4, "hamer": 5e-4, "csvit": 5e-4}
METRICS = ("mpjpe_rel", "mpjpe_pa", "mpjpe_cam")
MOST_OF_BETTER_PEER = {"mpjpe_rel": 0.85, "mpjpe_pa": 0.85, "mpjpe_cam": 0.7}
VAL_BATCH = 125
PRETRAIN_SEED = 1000
BACKBONE_LR = 0.4  # of a network's own learning rate
FULL = {"step": 2000, "pretrain": 3000, "train": 24000, "val": 1000, "seeds": [0, 1, 2]}
QUICK = {"step": 40, "pretrain": 40, "train": 500, "val": 100, "seeds": [0]}


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
    parser.add_argument(
        "--pretrain", type=int, help=f"steps of the backbone on 2D joints; 0: from scratch (default {FULL['pretrain']})"
    )
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
    pretrain = size["pretrain"] if args.pretrain is None else args.pretrain
    weights = pretrained_backbone(cfg, train, pretrain, out, say) if pretrain else None
    cells = []
    for seed in seeds:
        for method in args.method:
            lr = args.lr or LEARNING_RATE[method]
            settings = cell_settings(cfg, method, seed, lr, pretrain) | {"name": args.name}
            cell = _read(out).get(_digest(settings))
            if cell is None:
                torch.manual_seed(seed)
                hand = load_hand(cfg.MODEL.hand_model)
                net = OurNet(cfg, hand) if method == "ours" else args.peer(method)(cfg.MODEL, hand)
                if weights is not None:
                    net.backbone.load_state_dict(weights)
                cell = make_cell(net, cfg, settings, train, val, say)
                text = json.dumps(_read(out) | {_digest(settings): cell}, indent=1)
                write_text_atomic(out / "accuracy.json", text + "\n")
            cells.append(cell)
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
        "GENERAL.warmup_step=0",  # the bench has its own
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


class Locator(nn.Module):
    """The backbone and a linear read-out of the joints in the patch."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.backbone = Backbone(cfg.MODEL.backbone, cfg.MODEL.img_size)
        self.readout = KeypointHead(self.backbone.hidden_size, self.backbone.grid_size, self.backbone.patch_size)
        for name in ("img_mean", "img_std"):
            self.register_buffer(name, torch.tensor(getattr(cfg.MODEL, name)).view(1, 3, 1, 1))

    def training_loss(self, batch: Batch) -> torch.Tensor:
        seen = self.readout(self.backbone((batch.patch.float() / 255.0 - self.img_mean) / self.img_std))
        return (seen - batch.joint_patch).abs().mean()


def pretrained_backbone(
    cfg: Config, data: Batch, num_step: int, out: Path, say: Callable[[str], None]
) -> dict[str, torch.Tensor]:
    """The weights that every network starts from, learned once on the 2D joints of the training set."""
    batch = cfg.TRAIN.sample_per_device
    what = {"backbone": asdict(cfg.MODEL.backbone), "img_size": cfg.MODEL.img_size, "step": num_step, "batch": batch}
    file = out / f"backbone-{_digest(what | asdict(cfg.DATA.demo))}.pt"
    if not file.is_file():
        torch.manual_seed(PRETRAIN_SEED)
        net = Locator(cfg).to(data.patch.device)
        lr = LEARNING_RATE["ours"]
        groups = [{"params": list(net.parameters()), "lr": lr, "peak_lr": lr, "weight_decay": 0.0}]
        train_network(net, net.training_loss, groups, cfg, num_step, PRETRAIN_SEED, data, "backbone", say)
        torch.save(net.backbone.state_dict(), file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
    return torch.load(file, weights_only=True, map_location="cpu")


# ---- a cell ---------------------------------------------------------------------------------------------------------


def cell_settings(cfg: Config, method: str, seed: int, lr: float, pretrain: int) -> dict[str, Any]:
    """All that decides a cell's result; cells of equal settings are equal."""
    model, train = asdict(cfg.MODEL), cfg.TRAIN
    settings = {
        "method": method,
        "seed": seed,
        "lr": lr,
        "pretrain": pretrain,
        "backbone_lr": BACKBONE_LR * lr,
        "step": cfg.GENERAL.total_step,
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


def make_cell(
    net: nn.Module, cfg: Config, settings: dict[str, Any], train: Batch, val: Batch, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train one network and measure it."""
    net.to(train.patch.device)
    if hasattr(net, "fit"):
        net.fit(train)
    begin = time.perf_counter()
    groups = net.parameter_groups(settings["lr"], settings["backbone_lr"], cfg.TRAIN.weight_decay)
    net.set_dropout_rate(0.0)
    who = f"{settings['method']}, seed {settings['seed']}"
    train_network(net, net.training_loss, groups, cfg, settings["step"], settings["seed"], train, who, say)
    return {
        "settings": settings,
        "metrics": measure(net, val),
        "seconds": round(time.perf_counter() - begin, 1),
        "parameters": sum(p.numel() for p in net.parameters()),
        "machine": machine(),
    }


def train_network(
    net: nn.Module,
    loss_of: Callable[[Batch], torch.Tensor],
    groups: list[dict[str, Any]],
    cfg: Config,
    num_step: int,
    seed: int,
    data: Batch,
    who: str,
    say: Callable[[str], None],
) -> None:
    """AdamW with warm-up and cosine, as the training loop has it, over the set in an order that the seed gives."""
    batch, warmup = cfg.TRAIN.sample_per_device, num_step // 25
    optimizer = torch.optim.AdamW(groups, fused=True)
    parameters = [p for group in groups for p in group["params"]]
    order = torch.Generator().manual_seed(seed)
    index = torch.empty(0, dtype=torch.long)
    net.train()
    for step in range(num_step):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * get_lr_factor(step, num_step, warmup)
        if len(index) < batch:
            index = torch.cat([index, torch.randperm(len(data), generator=order)])
        chosen, index = index[:batch], index[batch:]
        with torch.autocast("cuda", torch.bfloat16, enabled=data.patch.is_cuda):
            loss = loss_of(_rows(data, chosen))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.TRAIN.max_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            say(f"{who}: step {step} of {num_step}")


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
