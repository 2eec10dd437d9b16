"""`script/bench.py accuracy`: our decoder and losses against those of HaMeR and CS-ViT2, everything else equal.

All networks share the backbone and its pre-trained weights (model/mini), hand model, rendered training hands and their
order, batch, steps, optimizer and schedule; decoder, losses and peak learning rate are their own. The metrics of each
trained network (a cell: method and seed) are saved to `<out>/accuracy.json` at once, so an interrupted bench resumes.

Shapes: N samples of a set, B batch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from script.benchmarks.accuracy_report import METHODS, markdown_table, read_cells, report
from script.benchmarks.measurement import Figure, Status, compose_config, machine
from script.benchmarks.peers import PEERS
from src.batch import Batch
from src.config import BackboneConfig, Config
from src.data.demo.make import VERSION, make_demo_data
from src.data.loader import build_train_loader, build_val_loader
from src.data.mean_hand import mean_of
from src.hand.load import load_hand
from src.hand.mano import ManoLayer
from src.hand.skeleton import HandArrays
from src.loss import loss_counts, loss_sums, loss_weights, mean_terms
from src.metric import Samples, measure, target_points
from src.model.net import PoseNet
from src.train.validation import VALIDATED, baseline_metrics
from src.utils.files import write_atomic
from src.utils.train_utils import get_lr_factor

# Peak learning rates; docs/ABLATIONS.md has the results of other ones.
LEARNING_RATE = {"ours": 2e-3, "hamer": 1e-3, "csvit": 2e-3}
LOADED_TOGETHER = VAL_BATCH = 125
FULL = {"step": 2400, "train": 24000, "val": 1500, "seeds": [0, 1, 2]}  # three times the demo's steps
QUICK = {"step": 40, "train": 500, "val": 100, "seeds": [0]}


class OurNet(PoseNet):
    """PoseNet with the recipe's losses, computed as in `Trainer`."""

    loss_weight: torch.Tensor

    def training_loss(self, batch: Batch) -> torch.Tensor:
        sums = loss_sums(self(batch), batch, self.hand).sum(0)
        return mean_terms(sums, loss_counts(batch).sum(0)) @ self.loss_weight.to(sums.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--quick", action="store_true", help="a minute: shows that it runs, not who is better")
    parser.add_argument("--out", type=Path, default=Path("checkpoint/bench-accuracy"), help="hands and results")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", nargs="+", type=int, help="default 0 1 2")
    parser.add_argument("--step", type=int, help=f"optimizer steps of each cell (default {FULL['step']})")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, help="peak learning rate, instead of each method's own")
    default = "bf16" if torch.cuda.is_available() else "fp32"
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=default)
    parser.add_argument("--peer-weight", nargs="+", default=[], metavar="TERM=WEIGHT", help="of the peers' losses")
    parser.add_argument("--backbone", default="mini", help="a file of config/backbone (default: %(default)s)")
    parser.add_argument("--img-size", type=int, default=80, help="patch side, px (default 80)")
    parser.add_argument("--name", default="", help="a name for this variant in the results")
    parser.add_argument("--report", type=Path, help="only print the table of this results file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for stage1, e.g. LOSS.lambda_seen=0")


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Train and evaluate the cells that the results file does not have yet."""
    if args.report is not None:
        return reported(args.report)
    if args.peer_weight and not args.name:
        raise SystemExit("--peer-weight: give the variant a --name, or it would count as the comparison itself")
    size = QUICK if args.quick else FULL
    out = args.out / "quick" if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)
    results = out / "accuracy.json"
    step, seeds = args.step or size["step"], args.seed or size["seeds"]
    cfg = compose_config("stage1-demo", *config_overrides(args, out, size, step))
    train, val = load_sets(cfg, status)
    hand = load_hand(cfg.MODEL.hand_model)
    cells = []
    for seed in seeds:
        for method in args.method:
            lr = args.lr or LEARNING_RATE[method]
            settings = cell_settings(cfg, method, seed, lr) | {"name": args.name, "precision": args.precision}
            if method != "ours":
                settings["loss"] = peer_weights(PEERS[method].LOSS_WEIGHT, method, args.peer_weight)
            cell = read_cells(results).get(digest_of(settings))
            if cell is None:
                torch.manual_seed(seed)
                net = {"ours": OurNet, **PEERS}[method](cfg.MODEL, hand)
                net.loss_weight = loss_weights(cfg.LOSS) if method == "ours" else settings["loss"]
                cell = make_cell(net, cfg, settings, train, val, status)
                text = json.dumps(read_cells(results) | {digest_of(settings): cell}, indent=1)
                write_atomic(results, text + "\n")
            cells.append(cell)
    baseline = baseline_errors(train, val, hand)
    return report(cells) + [
        Figure(f"{metric}, image-independent baseline", mm, "mm") for metric, mm in baseline.items()
    ]


def peer_weights(published: Mapping[str, float], method: str, changed: Sequence[str]) -> dict[str, float]:
    """The published weights of a peer's losses, with the changes `TERM=WEIGHT` of the command line."""
    try:
        new = {term: float(value) for term, _, value in (item.partition("=") for item in changed)}
    except ValueError as error:
        raise SystemExit(f"--peer-weight: {error}") from None
    if unknown := ", ".join(sorted(set(new) - set(published))):
        raise SystemExit(f"--peer-weight: {method} has no term {unknown}; it has {', '.join(published)}")
    return {**published, **new}


def reported(file: Path) -> list[Figure]:
    """Print the table of a results file; return the figures of the cells that the default options give."""
    if not file.is_file():
        raise SystemExit(f"--report: no file {file}")
    cells = list(read_cells(file).values())
    print(markdown_table(cells))
    weights = weights_digest(compose_config("stage1-demo").MODEL.backbone)
    return report([cell for cell in cells if is_main(cell["settings"], weights)])


def is_main(settings: dict[str, Any], weights: str | None) -> bool:
    """Whether a cell belongs to the comparison that the default options make from these weights (their digest)."""
    return (
        settings["step"] == FULL["step"]
        and settings.get("weights") == weights
        and not settings["name"].strip()
        and settings["lr"] == LEARNING_RATE[settings["method"]]
    )


def config_overrides(args: argparse.Namespace, out: Path, size: dict[str, Any], step: int) -> list[str]:
    """The demo's network, losses and kind of hands, but more hands and steps."""
    side = max(160, args.img_size + 90)  # a crop shows a part of the image
    return [
        f"backbone={args.backbone}",
        f"MODEL.img_size={args.img_size}",
        f"DATA.root={out}/data-{side}",
        f"DATA.demo={{train_sample: {size['train']}, val_sample: {size['val']}, img_size: {side}}}",
        f"GENERAL.total_step={step}",
        "GENERAL.warmup_step=0",  # the bench has its own warm-up
        f"GENERAL.dropout_warmup_step={step}",  # no dropout: a run this short does not overfit
        f"TRAIN.sample_per_device={args.batch}",
        *args.overrides,
    ]


def cell_settings(cfg: Config, method: str, seed: int, lr: float) -> dict[str, Any]:
    """Everything that a cell's result depends on; its digest identifies the cell in the results file."""
    model, train = asdict(cfg.MODEL), cfg.TRAIN
    settings = {
        "method": method,
        "seed": seed,
        "lr": lr,
        "backbone_lr": lr * (1.0 if cfg.MODEL.backbone.random_init else train.backbone_lr / train.lr),
        "step": cfg.GENERAL.total_step,
        "batch": train.sample_per_device,
        "weight_decay": train.weight_decay,
        "max_grad": train.max_grad,
        "expansion_ratio": train.expansion_ratio,
        "demo": asdict(cfg.DATA.demo),
        "renderer": VERSION,
        "backbone": model["backbone"],
        "weights": weights_digest(cfg.MODEL.backbone),
        "img_size": model["img_size"],
        "dim": model["handec"]["dim"],
    }
    if method == "ours":
        settings |= {"model": model, "loss": asdict(cfg.LOSS)}
    return settings


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


def make_cell(
    net: nn.Module, cfg: Config, settings: dict[str, Any], train: Batch, val: Batch, status: Status
) -> dict[str, Any]:
    """Train and evaluate one network; the settings, metrics and cost go to the results file."""
    device = train.patch.device.type
    net.to(device)
    if settings["precision"] == "bf16":  # the losses stay in float32
        net.forward = torch.autocast(device, torch.bfloat16)(net.forward)
    if hasattr(net, "fit"):
        net.fit(train)
    begin = time.perf_counter()
    net.set_dropout_rate(0.0)
    train_network(net, cfg, settings, train, status)
    return {
        "settings": settings,
        "metrics": validate(net, val),
        "seconds": round(time.perf_counter() - begin, 1),
        "parameters": sum(p.numel() for p in net.parameters()),
        "machine": machine(),
    }


def train_network(net: nn.Module, cfg: Config, settings: dict[str, Any], data: Batch, status: Status) -> None:
    """AdamW with warm-up and cosine, as in the training loop; the seed determines the order of the samples."""
    num_step, batch = settings["step"], cfg.TRAIN.sample_per_device
    groups = net.parameter_groups(settings["lr"], settings["backbone_lr"], cfg.TRAIN.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    parameters = [p for group in groups for p in group["params"]]
    order = torch.Generator().manual_seed(settings["seed"])
    index = torch.empty(0, dtype=torch.long)
    net.train()
    for step in range(num_step):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * get_lr_factor(step, num_step, num_step // 25)
        if len(index) < batch:
            index = torch.cat([index, torch.randperm(len(data), generator=order)])
        chosen, index = index[:batch], index[batch:]
        net.training_loss(rows_of(data, chosen)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.TRAIN.max_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            status(f"{settings['method']}, seed {settings['seed']}: step {step} of {num_step}")


@torch.no_grad()
def validate(net: nn.Module, val: Batch) -> dict[str, float]:
    """The metrics of the validation sample, mm."""
    net.eval()
    parts = []
    for index in torch.arange(len(val)).split(VAL_BATCH):
        batch = rows_of(val, index)
        prediction = net(batch)
        target = net.hand(net.hand.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean), batch.mano_shape).vert
        parts.append(Samples.of_batch(batch, measure(prediction, batch, target, VALIDATED)))
    return Samples.join(parts).means()


def baseline_errors(train: Batch, val: Batch, hand: HandArrays) -> dict[str, float]:
    """MPJPE (mm) of the image-independent baseline on the validation set, root-relative and after Procrustes alignment.
    A network that is not below it has learned nothing from the images."""
    labels = train.map(lambda t: t.cpu().numpy())
    layer, val = ManoLayer(hand), val.to("cpu")
    target_vert = layer(layer.pose_to_rotmat(val.mano_pose, val.flat_hand_mean), val.mano_shape).vert
    values = baseline_metrics(mean_of(labels, hand, train.patch.shape[-1]), val, target_points(val, target_vert))
    return {n: (v := values[f"{n}_mean_hand"]).total.sum() / v.count.sum() for n in ("mpjpe_rel", "mpjpe_pa")}


def digest_of(what: dict[str, Any]) -> str:
    """A name for a description: equal descriptions have equal names."""
    return blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()


def weights_digest(backbone: BackboneConfig) -> str | None:
    """Digest of the pre-trained weights that all networks start from; None for random ones."""
    if backbone.random_init:
        return None
    return blake2b((Path(backbone.backbone_str) / "model.safetensors").read_bytes(), digest_size=8).hexdigest()
