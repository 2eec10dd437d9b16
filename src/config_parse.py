"""From what Hydra composed to a checked Config, or a ConfigError that names every wrong key, its value and the fix."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config import Config, ConfigError, cross_problems, flatten

# `${env:NAME,default}` in a configuration: as in a shell, a variable that is set but empty counts as unset.
OmegaConf.register_new_resolver("env", lambda name, default=None: os.environ.get(name) or default, replace=True)

GROUPS = ("data", "backbone", "augmentation", "dropout", "launch")
_OVERRIDE = re.compile(r"^[+~]{0,2}(?!hydra[./])([A-Za-z_][\w.]*)(?:@[\w.]+)?(?:=|$)")


def parse_config(composed: DictConfig | Mapping[str, Any]) -> Config:
    """Type and check a composed configuration.

    Raises:
        ConfigError: naming every wrong key with its value and the fix.
    """
    plain = OmegaConf.to_container(composed, resolve=True) if isinstance(composed, DictConfig) else dict(composed)
    problems = [unknown_key_message(key) for key in flatten(plain) if not is_known_key(key)]
    if problems:
        raise ConfigError("\n".join(problems))
    typed = OmegaConf.structured(Config)
    problems = [p for key, value in plain.items() if (p := _merge_section(typed, key, value))]
    problems += [f"{key} is missing: give it a value, e.g. {key}=..." for key in OmegaConf.missing_keys(typed)] * (
        not problems
    )
    if problems:
        raise ConfigError("\n".join(problems))
    cfg = OmegaConf.to_object(typed)
    problems = [*_bound_problems(cfg, ""), *cross_problems(cfg)]
    if problems:
        raise ConfigError("\n".join(problems))
    return cfg


def check_overrides(arguments: list[str]) -> None:
    """Refuse command-line overrides of keys that do not exist, naming the nearest one that does.

    Hydra would refuse most of them too, but in words about its own structure.

    Raises:
        ConfigError: one line per unknown key.
    """
    keys = [match[1] for argument in arguments if (match := _OVERRIDE.match(argument))]
    problems = [unknown_key_message(key) for key in keys if not (is_known_key(key) or key in GROUPS)]
    if problems:
        raise ConfigError("\n".join(problems))


def _merge_section(typed: DictConfig, key: str, value: Any) -> str | None:
    """Merge one value tree into the typed config, leaf by leaf so that the message can name the leaf."""
    if isinstance(value, Mapping) and not _is_free_form(key):
        if OmegaConf.select(typed, key) is None:
            OmegaConf.update(typed, key, _optional_section(key))
        return "\n".join(p for k, v in value.items() if (p := _merge_section(typed, f"{key}.{k}", v))) or None
    try:
        OmegaConf.update(typed, key, value, merge=False)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        return f"{key}={value}: {reason}. Expected {_type_name(key)}"
    return None


def _schema(key: str) -> Any:
    """The type that the schema gives a dotted key; None when it has no such key."""
    here: Any = Config
    for part in key.split("."):
        here = _dataclass_of(here)
        hints = get_type_hints(here) if here else {}
        if part not in hints:
            return None
        here = hints[part]
    return here


def _dataclass_of(hint: Any) -> Any:
    """The dataclass in a type hint (`X` or `X | None`), else None."""
    options = getattr(hint, "__args__", (hint,))
    return next((o for o in options if is_dataclass(o)), None)


def _optional_section(key: str) -> Any:
    return OmegaConf.structured(_dataclass_of(_schema(key)))


def _is_free_form(key: str) -> bool:
    return _schema(key) is Any


def _type_name(key: str) -> str:
    hint = _schema(key)
    return (
        hint.__name__
        if isinstance(hint, type) and not getattr(hint, "__args__", None)
        else str(hint).replace("NoneType", "null")
    )


def is_known_key(key: str) -> bool:
    """Whether the schema has this dotted key (keys below a free-form value count as known)."""
    parts = key.split(".")
    return any(_is_free_form(".".join(parts[:n])) for n in range(1, len(parts))) or _schema(key) is not None


def known_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections included."""
    for name, hint in get_type_hints(cls).items():
        yield prefix + name
        if section := _dataclass_of(hint):
            yield from known_keys(section, f"{prefix}{name}.")


def unknown_key_message(key: str) -> str:
    """What to tell a user who typed a key that does not exist, with the nearest ones that do."""
    known = [*known_keys(), *GROUPS]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    leaf = key.rsplit(".", 1)[-1]
    near = near or [k for k in known if k.rsplit(".", 1)[-1].lower() == leaf.lower()][:1]
    hint = f"did you mean {near[0]}?" if near else "all keys stand in config/stage1-base.yaml"
    return f"{key}: there is no such key; {hint}"


def _bound_problems(section: Any, prefix: str) -> Iterator[str]:
    for spec in fields(section):
        key, value = f"{prefix}{spec.name}", getattr(section, spec.name)
        if is_dataclass(value):
            yield from _bound_problems(value, f"{key}.")
        elif value is not None:
            for item in value if isinstance(value, list) else [value]:
                if problem := _bound_problem(item, spec.metadata):
                    yield f"{key}={value}: {problem}"


def _bound_problem(value: Any, bounds: Mapping[str, Any]) -> str | None:
    if "choices" in bounds and value not in bounds["choices"]:
        near = difflib.get_close_matches(str(value), bounds["choices"], n=1)
        return f"choose one of {', '.join(bounds['choices'])}" + (f"; did you mean {near[0]}?" if near else "")
    if isinstance(value, float) and value != value:
        return "is not a number"
    if "minimum" in bounds and value < bounds["minimum"]:
        return f"must be at least {bounds['minimum']}"
    if "at_most" in bounds and value > bounds["at_most"]:
        return f"must be at most {bounds['at_most']}"
    if "below" in bounds and value >= bounds["below"]:
        return f"must be in [{bounds['minimum']}, {bounds['below']}), e.g. 0.1"
    return None
