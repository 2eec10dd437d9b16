"""The model card of a released network: README.md, with facts filled in from its run.

The facts are between two marker lines. A later export replaces them and keeps the rest of the file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from src.checkpoint.folder import MODEL
from src.checkpoint.network import LoadedNetwork
from src.checkpoint.save import read_state
from src.tracking.tracker import METRICS, read_rows
from src.utils.files import write_atomic

CARD = "README.md"
BEGIN, END = "<!-- facts: written by script/export.py, do not edit -->", "<!-- end of facts -->"
_BLOCK = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
_METRICS = ("mpjpe_cam", "mpjpe_rel", "mpjpe_pa", "mpvpe_rel", "root_error")

_SKELETON = """# {title}

TODO: what the network does, and for what it is good enough.

{facts}

## Training

TODO: the machine, and the hours that training took.

```bash
python script/stage1.py --config-name={config}   # TODO: the overrides
```

**Data.** TODO: what the network was trained on, how much of it, and the licence of each set.

## Figures

TODO: results on data that the network was not trained on, with the command that measured them.

## Use

```bash
python script/predict.py {folder} photo.jpg --handedness right
python script/evaluate.py {folder}   # its own validation hands, rendered on first use
python script/export.py {folder} --to onnx
python script/stage1.py --config-name={config} MODEL.init_from={folder}   # a new run from these weights
```

Training cannot be resumed from this folder: the optimizer state is not part of it.

## Licence

Apache-2.0, as the code. {hand_licence}
"""


def read_card(path: Path) -> str | None:
    """The text of an existing card; None without one. Raises ValueError if it lacks the markers of the facts."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    if not _BLOCK.search(text):
        raise ValueError(f"{path}: put the lines {BEGIN} and {END} where the facts belong, or move the file away")
    return text


def write_card(folder: Path, card: str | None, loaded: LoadedNetwork, precision: str) -> None:
    """Write a new card into the released network's `folder`, or `card` with its facts updated.

    `loaded` is the network that was released, with its weights in `precision`.
    """
    facts = "\n".join([BEGIN, *_facts(loaded, precision, (folder / MODEL).stat().st_size), END])
    if card is None:
        mano = "The weights contain nothing of MANO; using them needs `MANO_RIGHT.pkl`, which has its own licence."
        standin = "The hand model is the one in this repository; MANO is not needed."
        name = folder.resolve().name
        card = _SKELETON.format(
            title=name,
            folder=f"model/{name}",
            config=read_state(loaded.folder).config_name or "TODO",
            hand_licence=standin if loaded.network.hand.name == "standin" else mano,
            facts=BEGIN + END,
        )
    write_atomic(folder / CARD, _BLOCK.sub(lambda _: facts, card, count=1))


def _facts(loaded: LoadedNetwork, precision: str, size: int) -> Iterator[str]:
    net = loaded.network
    weights = "float32" if precision == "fp32" else "matrices float16, vectors float32"
    rows = {
        "configuration": f"`{read_state(loaded.folder).config_name or 'unknown'}`",
        "step": f"{loaded.step}",
        "parameters": f"{_millions(net)} (backbone {_millions(net.backbone)}, decoder {_millions(net.decoder)})",
        "weights": f"`{MODEL}`, {size / 1e6:.1f} MB ({weights})",
        "input": f"{net.img_size} x {net.img_size} px, {loaded.crop:g} times the hand's box",
        "hand model": "`standin`, part of this repository" if net.hand.name == "standin" else "MANO",
    }
    yield from ("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()))
    if validation := _validation(loaded.folder, loaded.step):
        yield from ("", "Validation of its run at that step, mm, beside the image-independent baseline:", "")
        yield from ("| metric | value | baseline |", "|---|---|---|")
        for name in _METRICS:
            if name in validation:
                baseline = validation.get(f"{name}_mean_hand")
                yield f"| `{name}` | {validation[name]:.1f} | {'' if baseline is None else f'{baseline:.1f}'} |"


def _validation(checkpoint: Path, step: int) -> dict[str, float]:
    """The run's validation at `step`; empty for a checkpoint without its run folder."""
    rows, _ = read_rows(checkpoint.parent.parent / METRICS, 0, count=sys.maxsize)
    return next((row for row in reversed(rows) if row["subset"] == "val" and row["step"] == step), {})


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
