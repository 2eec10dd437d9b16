"""Turn what Hydra composed, or a user typed, into a checked Config, or into a ConfigError that lists every mistake."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config import Config, ConfigError, cross_problems, flatten, schema, section_of

# `${env:NAME,default}` in a configuration: as in a shell's ${NAME:-default}, an empty variable counts as unset.
OmegaConf.register_new_resolver("env", lambda name, default=None: os.environ.get(name) or default, replace=True)

CONFIG_DIR = Path(__file__).resolve().parents[1] / "config"
FREE_FORM = ("DATA.train.source", "DATA.val.source")  # a list of patterns or named sources
GROUPS = ("data", "backbone", "augmentation", "dropout", "launch")
# our key -> what other training tools call it (lower case, without their prefixes)
OTHER_NAMES = {
    "TRAIN.sample_per_device": "batch_size batchsize train_batch_size per_device_train_batch_size micro_batch_size bs",
    "TRAIN.lr": "learning_rate base_lr max_lr",
    "TRAIN.weight_decay": "wd",
    "TRAIN.max_grad": "grad_clip clip_grad max_grad_norm gradient_clip_val grad_clip_norm",
    "TRAIN.grad_accum_step": "gradient_accumulation_steps accumulate_grad_batches grad_accum_steps accum_steps",
    "TRAIN.mixed_precision": "precision amp dtype fp16 bf16",
    "GENERAL.total_step": "max_steps max_step num_steps total_steps steps max_iters iterations"
    " epochs epoch num_epochs max_epochs num_train_epochs",
    "GENERAL.warmup_step": "warmup_steps num_warmup_steps warmup_iters warmup_epochs",
    "GENERAL.log_step": "log_interval logging_steps log_every_n_steps log_freq",
    "GENERAL.checkpoint_step": "save_steps save_interval eval_steps eval_interval val_interval checkpoint_interval",
    "GENERAL.num_worker": "num_workers workers dataloader_num_workers",
    "GENERAL.seed": "random_seed manual_seed",
    "GENERAL.output_root": "output_dir out_dir save_dir log_dir work_dir exp_dir output",
    "GENERAL.resume_path": "resume resume_from resume_from_checkpoint ckpt_path",
    "MODEL.init_from": "pretrained pretrained_path load_from weights checkpoint",
    "MODEL.img_size": "image_size input_size resolution",
    "DATA.root": "data_dir data_root data_path dataset_dir",
}
_OUR_KEY = {name: key for key, names in OTHER_NAMES.items() for name in names.split()}
PATHS = (
    "GENERAL.output_root",
    "GENERAL.resume_path",
    "DATA.root",
    "DATA.index_dir",
    "MODEL.init_from",
    "MODEL.hand_model",
    "MODEL.backbone.backbone_str",
    "AIM.repo",
)
_OVERRIDE = re.compile(r"^(?:~|\+{0,2}(?=.*=))(?!hydra[./])([A-Za-z_][\w.]*)(?:@[\w.]+)?(?:=([\w.,-]*$)?|$)")


def parse_config(composed: DictConfig | Mapping[str, Any]) -> Config:
    """Type and check a composed configuration. Raises ConfigError: a line for each wrong key, its value and the fix."""
    plain = OmegaConf.to_container(composed, resolve=True) if isinstance(composed, DictConfig) else dict(composed)
    flat = flatten(plain, whole=FREE_FORM)
    _raise_if_any(unknown_key_message(key) for key in flat if not is_known_key(key))
    typed = OmegaConf.structured(Config)
    problems = list(_fill(typed, flat))
    if missing := sorted(OmegaConf.missing_keys(typed)):  # no value, or one of the wrong type
        raise ConfigError("\n".join(problems or (f"{key} is missing: set it, e.g. {key}=..." for key in missing)))
    cfg = OmegaConf.to_object(typed)
    _raise_if_any([*problems, *cross_problems(cfg)])
    return cfg


def check_command_line(arguments: list[str]) -> None:
    """Raises ConfigError for unknown overrides (KEY=VALUE), configuration names and options: a line for each."""
    _raise_if_any([*_override_problems(arguments), *_option_problems(arguments)])


def quote_paths(arguments: Iterable[str]) -> list[str]:
    """The arguments, with paths quoted that Hydra would parse: `DATA.root=/data/hands [2024]` is not a list."""
    return [_quote_path(argument) for argument in arguments]


def _quote_path(argument: str) -> str:
    key, _, value = argument.partition("=")
    is_literal = "[" in value[1:] or os.path.exists(os.path.expanduser(value))
    if key.lstrip("+") not in PATHS or value[:1] in ("'", '"') or not is_literal or re.fullmatch(r"[\w./-]*", value):
        return argument
    return "{}='{}'".format(key, value.replace("'", r"\'"))


def _has_own_files(arguments: list[str]) -> bool:
    """Whether Hydra is also given a folder of the user's configurations, whose names are not checked here."""
    options = ("--config-dir", "-cd", "--config-path", "-cp", "hydra.searchpath")
    return any(argument.startswith(options) for argument in arguments)


def _raise_if_any(problems: Iterable[str]) -> None:
    if text := "\n".join(problems):
        raise ConfigError(text)


def _override_problems(arguments: list[str]) -> Iterator[str]:
    for match in filter(None, map(_OVERRIDE.match, arguments)):
        key, value = match.groups()  # the value only if it is a word or a list of words
        if key in GROUPS:
            known = sorted(path.stem for path in (CONFIG_DIR / key).glob("*.yaml"))
            names = [] if value is None or _has_own_files(arguments) else value.removesuffix(".yaml").split(",")
            for name in names:
                if name not in (*known, "null"):
                    yield f"{key}={name}: there is no config/{key}/{name}.yaml; {_choose(name, known)}"
        elif not is_known_key(key):
            yield unknown_key_message(key)


def _option_problems(arguments: list[str]) -> Iterator[str]:
    """Problems of options: an unknown configuration name, or another tool's option."""
    known = sorted({path.stem for path in CONFIG_DIR.glob("stage1-*.yaml")} - {"stage1-base"})
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        option, has_value, value = argument.partition("=")
        if option in ("--config-name", "-cn"):
            name = value if has_value else following
            if not _has_own_files(arguments) and not (CONFIG_DIR / f"{name.removesuffix('.yaml')}.yaml").is_file():
                yield f"--config-name={name}: there is no config/{name}.yaml; {_choose(name, known)}"
        elif option.startswith("-") and (key := _meant_key(option.lstrip("-").replace("-", "_"))):
            yield f"{option}: there is no such option; use {key}=..."


def _choose(value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    return f"choose one of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")


def _fill(typed: DictConfig, flat: Mapping[str, Any]) -> Iterator[str]:
    """Fill the typed config with a flat one in the order of the schema; yields a line for each unusable value."""
    for key, (hint, bounds) in schema().items():
        if key not in flat:
            if OmegaConf.select(typed, key) is None and any(below.startswith(f"{key}.") for below in flat):
                OmegaConf.update(typed, key, OmegaConf.structured(section_of(hint)))  # an optional section
            continue
        value = flat[key]
        if isinstance(value, float) and value.is_integer() and hint in (int, int | None):
            value = int(value)  # 1e5
        try:
            OmegaConf.update(typed, key, value, merge=False)
        except OmegaConfBaseException as error:
            kind = hint.__name__ if type(hint) is type else str(hint).replace("None", "null")
            yield f"{key}={value}: {str(error).splitlines()[0]}. Expected {kind}"
            continue
        value = OmegaConf.select(typed, key)
        items = value if isinstance(value, ListConfig) else [value]
        yield from (f"{key}={value}: {p}" for item in items if item is not None and (p := _bound_problem(item, bounds)))


def is_known_key(key: str) -> bool:
    """Whether the schema has this dotted key (any key below a free-form value is known)."""
    return key in schema() or key.startswith(tuple(f"{free}." for free in FREE_FORM))


def unknown_key_message(key: str) -> str:
    """The error for an unknown key, with the key that the user may have meant."""
    meant = _meant_key(key)
    if key.rpartition(".")[2].lower() in _OUR_KEY:
        hint = f"use {meant}" + ", in optimizer steps" * ("epoch" in key.lower())
    else:
        near = [meant] if meant else difflib.get_close_matches(key, [*schema(), *GROUPS], n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else "config/stage1-base.yaml lists all keys"
    return f"{key}: there is no such key; {hint}"


def _meant_key(key: str) -> str | None:
    """Our key for another tool's option, or for the same name in another section."""
    leaf = key.rpartition(".")[2].lower()
    same = [known for known in schema() if known.rpartition(".")[2].lower() == leaf]
    return _OUR_KEY.get(leaf) or next(iter(difflib.get_close_matches(key, same, n=1, cutoff=0.0)), None)


def _bound_problem(value: Any, bounds: Mapping[str, Any]) -> str | None:
    if "choices" in bounds and value not in bounds["choices"]:
        return _choose(str(value), bounds["choices"])
    if isinstance(value, float) and value != value:
        return "is not a number"
    if "minimum" in bounds and value < bounds["minimum"]:
        return f"must be at least {bounds['minimum']}"
    if "at_most" in bounds and value > bounds["at_most"]:
        return f"must be at most {bounds['at_most']}"
    if "below" in bounds and value >= bounds["below"]:
        return f"must be in [{bounds['minimum']}, {bounds['below']}), e.g. 0.1"
    return None
