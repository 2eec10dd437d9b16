"""The configuration schema: sections GENERAL, TRAIN, DATA, MODEL, LOSS and AIM with types, bounds and cross-key rules.

Defaults are in config/*.yaml only, so no field has one here. src/config_parse.py fills these classes from the config
that Hydra composed. Nothing here imports torch or reads files, so that mistakes are reported immediately.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from omegaconf import MISSING


class ConfigError(ValueError):
    """An unusable configuration; the message lists each wrong key with its value and the fix."""


def knob(
    minimum: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    at_most: float | None = None,
    housekeeping: bool = False,
) -> Any:
    """A required config field with the bounds its value (or each item of a list) must keep.

    `housekeeping`: the value changes no number of a run, e.g. how often it logs or where it writes.
    """
    bounds = {"minimum": minimum, "below": below, "at_most": at_most, "choices": choices}
    metadata = {k: v for k, v in bounds.items() if v not in (None, ())}
    return field(default=MISSING, metadata=metadata | {"housekeeping": housekeeping})


@dataclass
class GeneralConfig:
    """Length of the run, intervals (in optimizer steps), seeds and output folder."""

    total_step: int = knob(minimum=1)
    log_step: int = knob(minimum=1, housekeeping=True)
    vis_step: int = knob(minimum=1, housekeeping=True)
    checkpoint_step: int = knob(minimum=1)
    keep_checkpoint: int = knob(minimum=1, housekeeping=True)
    warmup_step: int = knob(minimum=0)
    dropout_warmup_step: int = knob(minimum=0)
    dropout_schedule: str = knob(choices=("gate", "linear", "cosine"))
    num_worker: int = knob(minimum=0, housekeeping=True)
    prefetch_factor: int = knob(minimum=1, housekeeping=True)
    seed: int = knob(minimum=0)
    val_seed: int = knob(minimum=0)
    output_root: str = knob(housekeeping=True)
    resume_path: str | None = knob(housekeeping=True)
    description: str = knob(housekeeping=True)


@dataclass
class TrainConfig:
    """The optimizer and the augmentation of training samples.

    `scale_z_range` and `scale_f_range` are one zoom of the patch under two names: the ranges multiply.
    `expansion_ratio` (patch side over hand box side) also holds for validation and prediction.
    """

    lr: float = knob(minimum=0)
    backbone_lr: float | None = knob(minimum=0)
    optimizer: str = knob(choices=("adamw", "muon"))
    weight_decay: float = knob(minimum=0)
    max_grad: float = knob(minimum=0)
    max_skipped_step: int = knob(minimum=1)
    grad_accum_step: int = knob(minimum=1)
    sample_per_device: int = knob(minimum=1)
    mixed_precision: str = knob(choices=("auto", "no", "tf32", "bf16", "fp16"))
    compile: bool = knob()
    activation_checkpointing: bool = knob()
    shard_weights: bool = knob()
    expansion_ratio: float = knob(minimum=0.1)
    scale_z_range: list[float] = knob(minimum=0.1)
    scale_f_range: list[float] = knob(minimum=0.1)
    persp_rot_max: float = knob(minimum=0, at_most=60)
    rot_max: float = knob(minimum=0, at_most=180)
    shift_max: float = knob(minimum=0, at_most=1)
    brightness: float = knob(minimum=0, at_most=1)
    contrast: float = knob(minimum=0, at_most=1)
    saturation: float = knob(minimum=0, at_most=1)
    noise_std: float = knob(minimum=0)
    blur_max: float = knob(minimum=0)
    occlusion_prob: float = knob(minimum=0, at_most=1)


@dataclass
class TrainSourceConfig:
    """`source`: a list of patterns, or named sources `{name: {source: [...], weight: w}}`; see `named_sources`."""

    source: Any = knob()
    eval_sample: int = knob(minimum=0)


@dataclass
class ValSourceConfig:
    """`max_sample` limits the fixed validation sample; null uses every frame."""

    source: Any = knob()
    max_sample: int | None = knob(minimum=1)


@dataclass
class DemoConfig:
    """The demo data set, rendered on first use."""

    train_sample: int = knob(minimum=1)
    val_sample: int = knob(minimum=1)
    img_size: int = knob(minimum=32)
    seed: int = knob(minimum=0)
    free_rotation: float = knob(minimum=0, at_most=1)


@dataclass
class DataConfig:
    """Where the shards are and how they are read."""

    root: str = knob()
    stride: int = knob(minimum=1)
    index_dir: str | None = knob(housekeeping=True)
    max_bad_fraction: float = knob(minimum=0, at_most=1, housekeeping=True)
    train: TrainSourceConfig = field(default_factory=TrainSourceConfig)
    val: ValSourceConfig = field(default_factory=ValSourceConfig)
    demo: DemoConfig | None = knob()


@dataclass
class BackboneConfig:
    """A DINOv2 backbone: a folder of pre-trained weights, or random weights of the shape given here."""

    backbone_str: str = knob()
    random_init: bool = knob()
    hidden_size: int = knob(minimum=1)
    num_layer: int = knob(minimum=1)
    num_head: int = knob(minimum=1)
    patch_size: int = knob(minimum=1)
    swiglu: bool = knob()


@dataclass
class HandDecoderConfig:
    """The transformer decoder; `dropout` is the final rate of the schedule."""

    dim: int = knob(minimum=1)
    num_layer: int = knob(minimum=1)
    num_head: int = knob(minimum=1)
    dim_head: int = knob(minimum=1)
    dim_mlp: int = knob(minimum=1)
    dropout: float = knob(minimum=0, below=1)


@dataclass
class ModelConfig:
    """The network: patch size and normalisation, backbone, decoder and hand model."""

    img_size: int = knob(minimum=14)
    img_mean: list[float] = knob()
    img_std: list[float] = knob(minimum=1e-6)
    hand_model: str = knob()
    init_from: str | None = knob()
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    handec: HandDecoderConfig = field(default_factory=HandDecoderConfig)


@dataclass
class LossConfig:
    """Weights of the loss terms."""

    lambda_theta: float = knob(minimum=0)
    lambda_shape: float = knob(minimum=0)
    lambda_trans: float = knob(minimum=0)
    lambda_rel: float = knob(minimum=0)
    lambda_img: float = knob(minimum=0)
    lambda_seen: float = knob(minimum=0)
    lambda_heat: float = knob(minimum=0)


@dataclass
class AimConfig:
    """The experiment tracker AIM. Without a `server_url` it writes to a local repository in `repo`."""

    server_url: str | None = knob(housekeeping=True)
    repo: str = knob(housekeeping=True)
    experiment: str = knob(housekeeping=True)


@dataclass
class Config:
    """All sections of a stage-1 run."""

    GENERAL: GeneralConfig = field(default_factory=GeneralConfig)
    TRAIN: TrainConfig = field(default_factory=TrainConfig)
    DATA: DataConfig = field(default_factory=DataConfig)
    MODEL: ModelConfig = field(default_factory=ModelConfig)
    LOSS: LossConfig = field(default_factory=LossConfig)
    AIM: AimConfig = field(default_factory=AimConfig)


@cache
def schema() -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Dotted key -> its type and the metadata that `knob` gave it, in the order of the classes, sections included."""

    def walk(section: type, prefix: str) -> Iterator[tuple[str, tuple[Any, Mapping[str, Any]]]]:
        hints = get_type_hints(section)
        for spec in fields(section):
            yield prefix + spec.name, (hints[spec.name], spec.metadata)
            if inner := section_of(hints[spec.name]):
                yield from walk(inner, f"{prefix}{spec.name}.")

    return dict(walk(Config, ""))


def section_of(hint: Any) -> Any:
    """The dataclass in a type hint (`X` or `X | None`), else None."""
    options = getattr(hint, "__args__", (hint,))
    return next((option for option in options if is_dataclass(option)), None)


def housekeeping_keys() -> list[str]:
    """Dotted keys whose value changes no number of a run: comparisons of configurations ignore them."""
    return [key for key, (_, metadata) in schema().items() if metadata.get("housekeeping")]


def flatten(tree: Mapping[str, Any], whole: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """{"A": {"b": 1}} -> {"A.b": 1}. Empty mappings, and those at the dotted keys `whole`, count as values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in whole:
            flat |= flatten(value, whole, f"{key}.")
        else:
            flat[key] = value
    return flat


@dataclass(frozen=True)
class NamedSource:
    """Shard patterns sampled as one source, with the source's sampling weight."""

    name: str
    patterns: tuple[str, ...]
    weight: float


def named_sources(source: Any) -> list[NamedSource]:
    """Parse the value of `DATA.train.source` or `DATA.val.source`. Raises ConfigError.

    A list of patterns is one source in which every frame is equally likely. `{name: {source: [...], weight: w}}` mixes
    several sources by weight, independently of their sizes.
    """
    if isinstance(source, str):
        source = [source]
    if isinstance(source, list) and source and all(isinstance(p, str) and p for p in source):
        return [NamedSource("all", tuple(source), 1.0)]
    if isinstance(source, Mapping) and source:
        return [_named_source(str(name), entry) for name, entry in source.items()]
    raise ConfigError("must be a list of patterns, e.g. ['DexYCB/s1/train/*'], or {name: {source: [...], weight: 1.0}}")


def _named_source(name: str, entry: Any) -> NamedSource:
    entry = entry if isinstance(entry, Mapping) else {"source": entry}
    if extra := sorted(set(entry) - {"source", "weight"}):
        raise ConfigError(f"source {name!r} has an unknown entry {extra[0]!r}; the entries are `source` and `weight`")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise ConfigError(f"source {name!r} has weight {weight!r}; it must be a positive number")
    return NamedSource(name, named_sources(entry.get("source"))[0].patterns, float(weight))


def cross_problems(cfg: Config) -> Iterator[str]:
    """Rules that involve several keys: yields a message for each one broken."""
    general, model, decoder = cfg.GENERAL, cfg.MODEL, cfg.MODEL.handec
    if general.warmup_step > general.total_step:
        yield (
            f"GENERAL.warmup_step={general.warmup_step}: longer than GENERAL.total_step={general.total_step}; "
            f"shorten it, e.g. GENERAL.warmup_step={general.total_step // 20}"
        )
    for name in ("scale_z_range", "scale_f_range"):
        value = getattr(cfg.TRAIN, name)
        if len(value) != 2 or value[0] > value[1]:
            yield f"TRAIN.{name}={value}: must be [low, high] with low <= high, e.g. [0.9,1.1]"
    if cfg.TRAIN.shard_weights and (cfg.TRAIN.compile or cfg.TRAIN.mixed_precision == "fp16"):
        other = "compile=true" if cfg.TRAIN.compile else "mixed_precision=fp16"
        yield f"TRAIN.shard_weights=true: cannot be combined with TRAIN.{other}; change one of them"
    if cfg.TRAIN.optimizer == "muon" and (cfg.TRAIN.shard_weights or cfg.TRAIN.mixed_precision == "fp16"):
        other = "shard_weights=true" if cfg.TRAIN.shard_weights else "mixed_precision=fp16"
        yield f"TRAIN.optimizer=muon: cannot be combined with TRAIN.{other}; set TRAIN.optimizer=adamw"
    for name in ("img_mean", "img_std"):
        if len(value := getattr(model, name)) != 3:
            yield f"MODEL.{name}={value}: must be three numbers (R, G, B)"
    if model.backbone.num_head > 0 and model.backbone.hidden_size % model.backbone.num_head:
        yield (
            f"MODEL.backbone.hidden_size={model.backbone.hidden_size}: "
            f"must be a multiple of MODEL.backbone.num_head={model.backbone.num_head}"
        )
    if decoder.dropout == 0 and general.dropout_schedule != "gate":
        yield (
            f"GENERAL.dropout_schedule={general.dropout_schedule}: requires MODEL.handec.dropout above 0 "
            f"to ramp to, e.g. 0.1"
        )
    if cfg.AIM.server_url is not None and not cfg.AIM.server_url.startswith("aim://"):
        yield f"AIM.server_url={cfg.AIM.server_url}: must look like aim://127.0.0.1:53800; null: a local repository"
    for key, source in (("DATA.train.source", cfg.DATA.train.source), ("DATA.val.source", cfg.DATA.val.source)):
        try:
            named_sources(source)
        except ConfigError as error:
            yield f"{key}={source}: {error}"
