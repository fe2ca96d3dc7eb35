"""Reads and writes PEFT's adapter_config.json, which gives the rank and the scale of each module. Settings that are not
supported are refused."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import regex

from isthmus.errors import ConfigError
from isthmus.model.process.files import present, shortened
from isthmus.model.weights.hub import find_folder
from isthmus.model.weights.huggingface.fields import Fields
from isthmus.model.weights.patterns import NAME, Matching, check_pattern, compiled, is_common, ways

ADAPTER_CONFIG = "adapter_config.json"

_NO_EFFECT = {
    "arrow_config", "auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
"""Fields that don't change what a stored adapter computes, or do so only together with another field that is
refused."""

_HONOURED = {
    "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "target_parameters",
    "task_type", "use_rslora",
}  # fmt: skip

_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

MOST_PATTERNS = 4096
"""Entries of rank_pattern, and of alpha_pattern"""
MOST_WAYS = 2 * NAME**4
"""The ways in which all entries of rank_pattern, or of alpha_pattern, together may match a name, because each may be
tried. A plain name counts as 100, since it may stand at the end of a longer one"""
MOST_CHARACTERS = 1 << 14
"""Of a regular expression: trainers write one with every module's name"""
MOST_UNBOUNDED = 6
"""Quantifiers without an upper limit in a regular expression: trainers write four, and one more is put before it"""
MOST_CHOICES = 1 << 10
"""Ways through the alternatives of a regular expression beside them"""

T = TypeVar("T")
Matches = Callable[[regex.Pattern[str], str], bool]

_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
"""The values of init_lora_weights that leave the base model's weights unchanged."""


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder is an adapter's, which says which model it adapts. It may hold that model as well."""
    return present(path / ADAPTER_CONFIG)


def base_folder(path: Path, download: bool = False) -> Path:
    """Returns the folder of the base model that an adapter folder names. The name is a path, relative to the adapter
    folder or to the working directory, or a name in the local Hugging Face cache, at the revision that the adapter
    names. Raises ConfigError when the base model isn't there. download: as in `find_folder`."""
    fields = Fields.load(path / ADAPTER_CONFIG)
    name = fields.raw("base_model_name_or_path", None)
    if not isinstance(name, str) or not name:
        raise fields.error(
            "base_model_name_or_path", "must name the base model's folder; base= (--base FOLDER) says where it is"
        )
    beside = path / name  # an absolute `name` replaces `path` here
    if os.path.isdir(beside):
        return beside
    try:
        return find_folder(Path(name), download=download, revision=_revision(fields))
    except ConfigError as error:
        raise fields.error(
            "base_model_name_or_path", f"isn't here: {error}. base= (--base FOLDER) says where it is"
        ) from None


def _revision(fields: Fields) -> str | None:
    revision = fields.raw("revision", None)
    if revision is not None and (
        not isinstance(revision, str) or not re.fullmatch(r"(?!/|.*\.\.)[\w./-]{0,200}", revision)
    ):
        raise fields.error("revision", "must name a branch, a tag or a commit of the base model")
    return revision or None


@dataclass(frozen=True)
class AdapterSettings:
    """The settings of a LoRA adapter in adapter_config.json."""

    fields: Fields
    rank: int
    alpha: float
    ranks: Mapping[regex.Pattern[str], int]
    """Ranks by a regular expression over the names of modules, of which the first that matches counts; `rank` is for
    all others"""
    alphas: Mapping[regex.Pattern[str], float]
    """Alphas in the same form; `alpha` is for all others"""
    rank_stabilized: bool
    """Whether the scale is alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732) instead of alpha / rank"""
    matching: Matching = field(default_factory=Matching, compare=False)
    """Matches all patterns of this adapter, and keeps the time that is left for it"""

    @classmethod
    def load(cls, path: Path) -> AdapterSettings:
        """Reads the settings. Raises ConfigError naming a field with which PEFT would compute another adapter than we
        do."""
        fields = Fields.load(path)
        fields.among("peft_type", ("LORA",))
        fields.among("task_type", ("CAUSAL_LM", None), None)
        fields.among("bias", ("none",), "none")
        fields.among("init_lora_weights", _HARMLESS_STARTS, True)
        for name in sorted(set(fields) - _NO_EFFECT - _HONOURED):
            if fields.raw(name) not in (None, False, "", [], {}):
                raise fields.error(name, "is not supported")
        alpha = fields.number("lora_alpha", 8)
        if not alpha:
            raise fields.error("lora_alpha", "must be positive")
        stabilized = fields.flag("use_rslora", False)
        return cls(
            fields,
            fields.integer("r", 8),
            alpha,
            _pattern(fields, "rank_pattern", lambda value: type(value) is int and value > 0, "whole numbers"),
            _pattern(fields, "alpha_pattern", _is_positive, "positive numbers"),
            stabilized,
        )

    def rank_of(self, key: str) -> int:
        return self._first_match("rank_pattern", self.ranks, key, self.rank)

    def scale_of(self, key: str) -> float:
        """The factor that B·A·x is multiplied by. key: from `key_of`."""
        return self._scale(self._first_match("alpha_pattern", self.alphas, key, self.alpha), self.rank_of(key))

    @property
    def scale(self) -> float:
        """The scale of modules that no pattern names."""
        return self._scale(self.alpha, self.rank)

    def _scale(self, alpha: float, rank: int) -> float:
        scale = alpha / (math.sqrt(rank) if self.rank_stabilized else rank)
        if not _LEAST <= scale <= _MOST:
            raise self.fields.error(
                "lora_alpha", f"or alpha_pattern makes the scale {scale}, and float32 can't hold it"
            )
        return scale

    def key_of(self, module: str, layer: int) -> str:
        """Returns the name that PEFT compares with the patterns for `module`. Raises ConfigError when PEFT would leave
        out the adapter that is stored for this module."""
        fields = self.fields
        weight = f"{module}.weight"
        if self._names("target_parameters", weight):
            return weight
        if not self._names("target_modules", module) and fields.raw("target_modules") != "all-linear":
            raise fields.error("target_modules", f"leaves out {module}, for which the file holds an adapter")
        if self._names("exclude_modules", module):
            raise fields.error("exclude_modules", f"leaves out {module}, for which the file holds an adapter")
        layers = fields.raw("layers_to_transform", None)
        if layers is None or layers == []:
            return module
        if fields.raw("layers_pattern", None) not in (None, "layers", [], ["layers"], ""):
            raise fields.error("layers_pattern", "must be layers, as they are called in this model")
        if layer not in (layers if isinstance(layers, list) else [layers]):
            raise fields.error("layers_to_transform", f"leaves out {module}, for which the file holds an adapter")
        return module

    def _names(self, name: str, module: str) -> bool:
        """Whether a field names a module or a parameter. The field holds a regular expression, or a list of the names'
        last parts."""
        value = self.fields.raw(name, None)
        if value is None:
            return False
        if isinstance(value, str):
            pattern = _compiled(self.fields, name, value)
            return self._in_time(name, self.matching.is_whole, pattern, module)
        if not isinstance(value, list) or not all(isinstance(end, str) for end in value):
            raise self.fields.error(name, "must be a list of names, or a regular expression")
        return any(module == end or module.endswith(f".{end}") for end in value)

    def _first_match(self, name: str, patterns: Mapping[regex.Pattern[str], T], module: str, default: T) -> T:
        found = (value for each, value in patterns.items() if self._in_time(name, self.matching.begins, each, module))
        return next(found, default)

    def _in_time(self, name: str, matches: Matches, pattern: regex.Pattern[str], module: str) -> bool:
        try:
            return matches(pattern, module)
        except TimeoutError:
            raise self.fields.error(
                name, "takes too long to be matched with the modules' names: use fewer quantifiers or entries"
            ) from None


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < _MOST


def _pattern(fields: Fields, name: str, is_right: Any, wanted: str) -> dict[regex.Pattern[str], Any]:
    values = fields.raw(name, None) or {}
    if not isinstance(values, dict) or not all(map(is_right, values.values())):
        raise fields.error(name, f"must map modules to {wanted}")
    if len(values) > MOST_PATTERNS:
        raise fields.error(name, f"must hold at most {MOST_PATTERNS} patterns")
    patterns = {_compiled(fields, name, rf"(.*\.)?({key})$"): value for key, value in values.items()}
    if sum(ways(pattern.pattern) for pattern in patterns) > MOST_WAYS:
        raise fields.error(name, "can match a module's name in too many ways: use fewer quantifiers or entries")
    return patterns


def _compiled(fields: Fields, name: str, pattern: str) -> regex.Pattern[str]:
    found = _checked(pattern)
    if isinstance(found, str):
        raise fields.error(name, f"is not supported: the regular expression {shortened(repr(pattern))} {found}")
    return found


@lru_cache(maxsize=64)
def _checked(pattern: str) -> regex.Pattern[str] | str:
    """A regular expression, or why it is refused: kept, because target_modules is asked for each module."""
    why = check_pattern(pattern, longest=MOST_CHARACTERS, unbounded=MOST_UNBOUNDED, choices=MOST_CHOICES)
    if why is None and not is_common(pattern):
        why = "has a brace that is no number of times, or a class by its name"
    return why or compiled(pattern)


def adapter_config(
    base: Path, rank: int, alpha: float, targets: tuple[list[str], list[str]], parts: Mapping[str, int]
) -> dict[str, Any]:
    """Returns the adapter_config.json of an adapter of `base`. targets: target_modules and target_parameters. parts:
    the modules (by regular expression) whose rank is a multiple of `rank`, and that multiple. Their alpha is multiplied
    too, so that all modules have the same scale."""
    return {
        "alpha_pattern": {module: _whole(count * alpha) for module, count in parts.items()},
        "base_model_name_or_path": str(base.resolve()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {module: count * rank for module, count in parts.items()},
        "target_modules": targets[0],
        "target_parameters": targets[1] or None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _whole(value: float) -> float | int:
    """Returns an int where `value` is whole, because PEFT declares alpha as int."""
    return int(value) if value == int(value) else value
