"""`script/bench.py peers`: end-to-end training steps of ours, HaMeR-style and CS-ViT2-style, on one machine.

Backbone, decoder width, batch, shards and workers are the same; data path and step follow the published sources:

* HaMeR (github.com/geopavlakos/hamer): workers decode the frame, crop the patch and normalise it to float32; the step
  is float32, checks that loss and gradient norm are finite and logs the loss, which synchronises three times.
* CS-ViT2 (github.com/Mine268/CS-ViT2): workers decode the frame and send it whole; the device converts it to float and
  warps one patch per sample; heatmaps in float32; the step is float32 and reads its loss.

In their favour: both read with our indexed reader and OpenCV's decoders (published: webdataset, PIL, torchvision), and
HaMeR's adversarial prior is omitted.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from script.benchmarks.measurement import Figure, Status, median_figure, ratio_figure, seconds_of
from script.benchmarks.peers import PEERS
from script.benchmarks.shards import records
from script.benchmarks.step import ON_GPU, open_run, training_step
from src.batch import Batch, Sample
from src.config import Config
from src.data.augment import NUM_UNIFORM, Augmentation, draw_augmentation
from src.data.crop import crop_samples, empty_batch, fill_labels
from src.data.dataset import HandDataset
from src.data.rng import uniforms
from src.data.shards.writer import write_shard
from src.hand.load import load_hand

ON_CPU = ["backbone=tiny", "MODEL.img_size=112", "TRAIN.sample_per_device=16", "GENERAL.num_worker=0"]
LEAST_RATIO = {"cuda": 2.0, "cpu": 1.5}
EPOCH = 100_000  # length of a peer's data set: more than the benchmark reads
MEAN = np.array([123.675, 116.28, 103.53], np.float32)[:, None, None]
STD = np.array([58.395, 57.12, 57.375], np.float32)[:, None, None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--repeat", type=int, default=5, help="blocks of each kind (default 5)")
    parser.add_argument("--block", type=int, default=10, help="steps a block (default 10)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for stage1, e.g. backbone=dinov2_small")


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Alternate blocks of each method's steps."""
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        status("writing shards, building networks")
        write_shard(records(256, "jpg"), Path(folder) / "000000.tar")
        data = [f"DATA.root={folder}", "DATA.train.source=['*.tar']", "DATA.val={source: ['*.tar'], max_sample: 16}"]
        defaults = ON_GPU if torch.cuda.is_available() else ON_CPU
        with open_run(*data, "MODEL.hand_model=standin", *defaults, *args.overrides) as training:
            cfg, dataset = training.cfg, training.train_loader.dataset
            hamer, csvit = HamerStep(cfg, dataset), CsVitStep(cfg, dataset)
            methods = {
                "our step": (training.micro_batches, partial(training_step, training)),
                "HaMeR's step": (hamer.batches, hamer.step),
                "CS-ViT2's step": (csvit.batches, csvit.step),
            }
            rates = measure(methods, cfg, args.repeat, args.block, status)
    shape = f"{cfg.MODEL.backbone.num_layer} x {cfg.MODEL.backbone.hidden_size}, {cfg.MODEL.img_size} px"
    note = f"{shape}, batch {cfg.TRAIN.sample_per_device}, {cfg.GENERAL.num_worker} workers"
    rows = [median_figure(name, values, "samples/s", note) for name, values in rates.items()]
    better = [max(pair) for pair in zip(rates["HaMeR's step"], rates["CS-ViT2's step"])]
    least = LEAST_RATIO["cuda" if torch.cuda.is_available() else "cpu"]
    return [*rows, ratio_figure("ours over the better peer", rates["our step"], better, at_least=least)]


def measure(
    methods: dict[str, tuple[Callable, Callable]], cfg: Config, repeat: int, block: int, status: Status
) -> dict[str, list[float]]:
    """Samples a second of each block, from the function that makes a method's batches and its step.

    A block starts its own workers and first uses up what they have prefetched.
    """
    prefetched = cfg.GENERAL.num_worker * cfg.GENERAL.prefetch_factor
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(repeat):
        for name, (make_batches, step) in methods.items():
            status(f"{name}, repetition {number + 1} of {repeat}")
            batches = make_batches()
            take_steps(step, batches, prefetched + 1)
            seconds = seconds_of(partial(take_steps, step, batches, block))
            rates[name].append(block * cfg.TRAIN.sample_per_device / seconds)
            del batches  # ends its workers
    return rates


def take_steps(step: Callable, batches: Iterator[Any], num: int) -> None:
    for batch in islice(batches, num):
        step(batch)


class PeerStep:
    """What the peers' steps share: torch's default AdamW, a loader of their own rows, float32."""

    peer: str  # key of PEERS
    rows: Callable[[HandDataset, list[int]], tuple]  # (data set, positions) -> inputs and labels

    def __init__(self, cfg: Config, dataset: HandDataset) -> None:
        self.cfg = cfg
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net = PEERS[self.peer](cfg.MODEL, load_hand(cfg.MODEL.hand_model)).to(self.device).train()
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        self.dataset = dataset

    def batches(self) -> Iterator[Any]:
        general, size = self.cfg.GENERAL, self.cfg.TRAIN.sample_per_device
        ahead = general.prefetch_factor if general.num_worker else None
        rows = partial(self.rows, self.dataset)  # called in the workers
        return iter(
            DataLoader(range(EPOCH), size, collate_fn=rows, num_workers=general.num_worker, prefetch_factor=ahead)
        )

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        """Backward, clip and optimizer step; returns the gradient norm."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.TRAIN.max_grad)
        self.optimizer.step()
        return norm


def read_samples(dataset: HandDataset, positions: list[int]) -> tuple[list[Sample], list[Augmentation]]:
    """The decoded samples at these positions of our order, with the parameters of our augmentation."""
    samples = [dataset.read(dataset.plan.locate(position)) for position in positions]
    draws = [uniforms("augment", position, num=NUM_UNIFORM) for position in positions]
    return samples, [draw_augmentation(draw, dataset.augment) for draw in draws]


def hamer_rows(dataset: HandDataset, positions: list[int]) -> tuple[torch.Tensor, Batch]:
    """The patches, normalised to float32 in the worker, with their labels."""
    batch = crop_samples(*read_samples(dataset, positions), dataset.img_size, dataset.expansion_ratio)
    patches = []
    for patch, position in zip(batch.patch, positions):
        colour = np.random.default_rng(position).uniform(0.8, 1.2, (3, 1, 1)).astype(np.float32)
        patches.append((np.clip(patch.astype(np.float32) * colour, 0, 255) - MEAN) / STD)
    return torch.from_numpy(np.stack(patches)), batch.map(torch.from_numpy)


class HamerStep(PeerStep):
    """The step of HaMeR's training module."""

    peer, rows = "hamer", staticmethod(hamer_rows)

    def step(self, batch: tuple[torch.Tensor, Batch]) -> None:
        patch, labels = (part.to(self.device) for part in batch)
        self.net.tokens = lambda _: self.net.backbone(patch)  # the patch came normalised
        loss = self.net.training_loss(labels)
        if torch.isnan(loss):
            raise FloatingPointError("the loss is not a number")
        norm = self.update(loss)
        float(norm), loss.item()  # error_if_nonfinite and the progress bar


def csvit_rows(dataset: HandDataset, positions: list[int]) -> tuple[list[torch.Tensor], Batch]:
    """The whole frames as uint8, with the labels and the homographies to the patches."""
    samples, augmentations = read_samples(dataset, positions)
    batch = empty_batch(len(samples), dataset.img_size)  # its patches are cropped on the device
    fill_labels(batch, range(len(samples)), samples, augmentations, dataset.expansion_ratio)
    frames = [torch.from_numpy(sample.image).permute(2, 0, 1).contiguous() for sample in samples]
    return frames, batch.map(torch.from_numpy)


class CsVitStep(PeerStep):
    """The step of CS-ViT2's training script."""

    peer, rows = "csvit", staticmethod(csvit_rows)

    def step(self, batch: tuple[list[torch.Tensor], Batch]) -> None:
        frames, labels = batch[0], batch[1].to(self.device)
        patch = [
            warp_frame(frame.to(self.device).float() / 255, matrix, self.cfg.MODEL.img_size)
            for frame, matrix in zip(frames, labels.image_to_patch)
        ]
        patch = self.augment(torch.stack(patch))
        loss = self.net.training_loss(replace(labels, patch=patch * 255))
        self.update(loss)
        loss.item()

    def augment(self, patch: torch.Tensor) -> torch.Tensor:
        """Brightness, contrast, saturation and noise on the device; [B, 3, S, S] in 0 .. 1."""
        bright, contrast, saturation = (torch.rand(3, len(patch), 1, 1, 1, device=self.device) * 0.4 + 0.8).unbind(0)
        grey = patch.mean(1, keepdim=True)
        patch = grey + saturation * (bright * patch - grey)
        patch = patch.mean((2, 3), keepdim=True) * (1 - contrast) + contrast * patch
        return (patch + 0.03 * torch.randn_like(patch)).clamp(0, 1)


def warp_frame(frame: torch.Tensor, image_to_patch: torch.Tensor, img_size: int) -> torch.Tensor:
    """Bilinear warp of a frame [3, H, W] by a homography [3, 3] to a patch [3, S, S]."""
    height, width = frame.shape[1:]
    axis = torch.arange(img_size, device=frame.device, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    point = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ torch.linalg.inv(image_to_patch).T
    point = point[..., :2] / point[..., 2:]
    scale = torch.tensor([2.0 / (width - 1), 2.0 / (height - 1)], device=frame.device)
    return F.grid_sample(frame[None], (point * scale - 1)[None], align_corners=True)[0]
