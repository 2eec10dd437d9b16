"""Replays a step that went wrong, on one process, and finds where its numbers first stop being finite.

`bad_batch-<step>/` (src/train/bad_batch.py) holds the batch and the weights before the step. The forward pass uses the
same seed and dropout rate, so on the same kind of device it gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from src.batch import Batch
from src.checkpoint.network import load_network
from src.loss import LOSS_TERMS, loss_counts, loss_sums, mean_terms
from src.model.net import PoseNet
from src.train.bad_batch import load_batch, load_step
from src.train.step import step_seed

_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def replay(folder: Path, device: str) -> list[str]:
    """The findings about the step in `folder`, line by line.

    Raises ValueError if the folder does not hold a step.
    """
    report = load_step(folder)
    net = load_network(folder, device=device).network.train()
    net.set_dropout_rate(report["dropout_rate"])
    terms = " ".join(f"{name}={float(value):.4g}" for name, value in report["terms"].items())
    lines = [f"step {report['step']}, {report['in_row']} skipped in a row: {terms}"]
    lines += [f"weights that are not finite: {name}" for name, p in net.named_parameters() if not _is_finite(p)]
    for rank in sorted({sample["rank"] for sample in report["samples"]}):
        lines += _replay_rank(net, load_batch(folder, rank, report), report, rank)
    bad = [name for name, p in net.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    examples = f", e.g. {', '.join(bad[:4])}" if bad else ""
    lines.append(f"gradients that are not finite: {len(bad)}{examples}")
    largest = max((float(p.detach().abs().max()), name) for name, p in net.named_parameters())
    lines.append(f"largest weight: {largest[0]:.3g} in {largest[1]}")
    return lines


def _replay_rank(net: PoseNet, batches: list[Batch], report: dict[str, Any], rank: int) -> list[str]:
    """Forward and backward of one process's micro-batches; the gradients accumulate in `net`."""
    torch.manual_seed(step_seed(report["seed"], report["step"] - 1, rank))
    device, lines = next(net.parameters()).device, []
    weight = torch.tensor(report["loss_weight"], device=device)
    dtype, names = _DTYPE.get(report["precision"]), {module: name for name, module in net.named_modules() if name}
    for batch in (batch.to(device) for batch in batches):
        bad: list[str] = []  # modules whose output is not finite though their input is, in forward order

        def find_bad(module: nn.Module, inputs: Any, output: Any, bad: list[str] = bad) -> None:
            if module in names and not bad and not _is_finite(output) and _is_finite(inputs):
                bad.append(names[module])

        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
        with register_module_forward_hook(find_bad), autocast:
            prediction = net(batch)
        lines.append(f"first module whose output is not finite: {bad[0] if bad else 'none'}")
        sums, counts = loss_sums(prediction, batch, net.hand), loss_counts(batch)
        lines += _sample_lines(batch, sums.detach() / counts.clamp(min=1), rank)
        (mean_terms(sums.sum(0), counts.sum(0)) @ weight).backward()
    return lines


def _sample_lines(batch: Batch, means: torch.Tensor, rank: int) -> Iterator[str]:
    """The samples whose loss is not finite; if all are finite, the one with the largest loss."""
    rows = [index for index, ok in enumerate(torch.isfinite(means).all(1).tolist()) if not ok]
    for index in rows or [int(means.sum(1).argmax())]:
        values = " ".join(f"{name}={value:.4g}" for name, value in zip(LOSS_TERMS, means[index].tolist(), strict=True))
        what = "not finite" if rows else "largest loss"
        yield f"process {rank}, {what}: {batch.source[index]} {batch.key[index]}: {values}"


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return True
