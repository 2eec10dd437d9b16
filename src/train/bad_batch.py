"""A batch whose loss or gradient was not finite: the samples and loss terms involved, and everything to replay it.

    <run folder>/bad_batch-<step>.json        for each skipped step (at most MAX_REPORT files): terms and samples
    <run folder>/bad_batch-<step>/            for the step that ended the run; script/replay_batch.py reads it
        report.json   batch-<rank>.safetensors   and a checkpoint of the network with the weights before that step

Steps are numbered as in the log: the number of steps done, this one included. Nothing here is pickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file, save_model

from src.batch import Batch
from src.checkpoint.folder import MODEL, STATE, write_manifest
from src.checkpoint.writer import Frozen
from src.data.dataset import MAX_ATTEMPT, HandDataset
from src.data.shards.errors import SampleError
from src.loss import LOSS_TERMS
from src.utils.files import write_atomic

MAX_REPORT = 100  # more files would fill the disk and show nothing new
MAX_NAMED = 4  # samples in a log line
_REPORT = "report.json"


class NumbersError(RuntimeError):
    """Too many steps in a row whose loss or gradient was not finite."""


@dataclass
class BadStep:
    """What is known of a skipped step."""

    step: int  # steps done, this one included
    in_row: int  # steps skipped in a row, this one included
    terms: dict[str, float]  # loss terms, their weighted sum and the gradient's norm
    samples: list[dict[str, Any]]  # rank, source, shard, key, position, and the terms that are not finite

    def suspects(self) -> list[dict[str, Any]]:
        """The samples whose own loss is not finite; all samples if only the gradient is not."""
        return [sample for sample in self.samples if sample["terms"]] or self.samples

    def __str__(self) -> str:
        suspects, terms = self.suspects(), [name for name, value in self.terms.items() if not math.isfinite(value)]
        names = [f"{'/'.join(Path(each['shard']).parts[-2:])}:{each['key']}" for each in suspects]
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        which = "every sample" if len(suspects) == len(self.samples) else "samples"
        return f"not finite: {', '.join(terms)}; {which}: {', '.join(names[:MAX_NAMED])}{more}"

    def advice(self) -> str:
        """Where to look for the cause."""
        if len(self.suspects()) == len(self.samples):
            return "Every sample is affected, so suspect the weights rather than the data: try a lower TRAIN.lr"
        return "Only these samples are affected: check their shards with script/check_shards.py, or exclude them"


def describe_samples(
    dataset: HandDataset, micro_batches: list[Batch], sample_sum: list[torch.Tensor], rank: int
) -> list[dict[str, Any]]:
    """Every sample of this process's share, with those of its loss terms [B, NUM_TERM] that are not finite."""
    samples = []
    for batch, sums in zip(micro_batches, sample_sum, strict=True):
        finite = torch.isfinite(sums).tolist()
        for key, source, position, ok in zip(batch.key, batch.source, batch.position.tolist(), finite, strict=True):
            terms = [name for name, good in zip(LOSS_TERMS, ok, strict=True) if not good]
            shard = find_shard(dataset, position, key)
            samples.append(
                {"rank": rank, "source": source, "shard": shard, "key": key, "position": position, "terms": terms}
            )
    return samples


def find_shard(dataset: HandDataset, position: int, key: str) -> str:
    """The shard of the sample `key` that was read at a position, be it the planned sample or a substitute."""
    place = dataset.plan.locate(position)
    for attempt in range(1, MAX_ATTEMPT + 1):
        try:
            if dataset.read(place).key == key:
                return str(dataset.sources[place.source][place.shard].shard)
        except (SampleError, OSError):
            pass
        place = dataset.plan.substitute(position, attempt)
    return "?"


def write_report(run_folder: Path, bad: BadStep, context: dict[str, Any]) -> None:
    """Write `bad_batch-<step>.json`. A resumed run that repeats the step writes the same file."""
    path = run_folder / f"bad_batch-{bad.step}.json"
    if path.exists() or sum(1 for _ in run_folder.glob("bad_batch-*.json")) < MAX_REPORT:
        write_atomic(path, _report_text(bad, context))


def _report_text(bad: BadStep, context: dict[str, Any]) -> str:
    terms = {name: value if math.isfinite(value) else str(value) for name, value in bad.terms.items()}
    report = {"step": bad.step, "in_row": bad.in_row, **context, "terms": terms, "samples": bad.samples}
    return json.dumps(report, indent=1)


def save_batch(folder: Path, rank: int, micro_batches: list[Batch]) -> None:
    """Save the tensors of this process's micro-batches."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for index, batch in enumerate(micro_batches):
        for field in fields(batch):
            if isinstance(value := getattr(batch, field.name), torch.Tensor):
                tensors[f"{index}.{field.name}"] = value.contiguous().cpu()
    save_file(tensors, folder / f"batch-{rank}.safetensors")


def save_step(folder: Path, bad: BadStep, context: dict[str, Any], net: Frozen, texts: dict[str, str]) -> None:
    """Save the main process's part: the report, and a checkpoint for `load_network`."""
    folder.mkdir(exist_ok=True)
    save_model(net, str(folder / MODEL))
    for name, text in {**texts, STATE: json.dumps({"step": bad.step}), _REPORT: _report_text(bad, context)}.items():
        write_atomic(folder / name, text)
    write_manifest(folder)


def load_step(folder: Path) -> dict[str, Any]:
    """The report of a replay folder. Raises ValueError if it cannot be read."""
    try:
        return json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / _REPORT} cannot be read ({error}); give a folder bad_batch-<step>") from error


def load_batch(folder: Path, rank: int, report: dict[str, Any]) -> list[Batch]:
    """The micro-batches of one rank as `save_batch` wrote them; keys come from the report."""
    tensors = load_file(folder / f"batch-{rank}.safetensors")
    samples = iter([each for each in report["samples"] if each["rank"] == rank])
    batches = []
    for index in range(1 + max(int(name.split(".")[0]) for name in tensors)):
        values = {name.split(".")[1]: t for name, t in tensors.items() if name.split(".")[0] == str(index)}
        rows = [next(samples) for _ in range(len(values["patch"]))]
        batches.append(Batch(key=[r["key"] for r in rows], source=[r["source"] for r in rows], **values))
    return batches
