"""Loads and unloads a running model's adapters, in one place that all front ends share."""

from __future__ import annotations

import logging
from pathlib import Path

from isthmus.adapters import AdapterInfo
from isthmus.errors import ConfigError, InvalidRequest, ModelNotFound
from isthmus.forms import check_string
from isthmus.model.weights.folder import ModelFolder, check_adapter_name, read_adapter
from isthmus.model.weights.hub import find_folder
from isthmus.serve.engine.adapters import Standing
from isthmus.serve.engine.engine import Engine

logger = logging.getLogger("isthmus")


def loaded(model: ModelFolder, engine: Engine, name: str, folder: Path) -> AdapterInfo:
    """Reads the adapter in a folder and loads it under a name. Takes a while; safe to call on any thread. folder: as
    `find_folder` takes it. Raises what `isthmus.adapters.HasAdapters.load_adapter` does."""
    try:
        check_adapter_name(model, check_string("name", name))
    except ConfigError as error:
        raise InvalidRequest("name", str(error).removeprefix("adapters: ")) from None
    engine.check_places()
    try:
        found = folder if folder.is_dir() else find_folder(folder)
    except (ConfigError, OSError) as error:
        raise ModelNotFound("path", str(error)) from None
    try:
        adapter, warnings = read_adapter(found, model, engine.executor.model.lora.rank)
        resident = engine.load_adapter(name, adapter)
    except (ConfigError, OSError) as error:
        raise InvalidRequest("path", f"{folder} can't be had beside {model.name}: {error}") from None
    for warning in warnings:
        logger.warning("%s", warning)
    return next(
        (info_of(each) for each in engine.standings() if each.resident == resident),
        info_of(Standing(resident, 0, loaded=False)),  # it has been unloaded meanwhile
    )


def unloaded(engine: Engine, name: str) -> AdapterInfo:
    """Raises InvalidRequest and ModelNotFound."""
    return info_of(engine.unload_adapter(check_string("name", name)))


def all_of(engine: Engine) -> list[AdapterInfo]:
    """The adapters that have a place in the engine."""
    return [info_of(each) for each in engine.standings()]


def info_of(standing: Standing) -> AdapterInfo:
    one = standing.resident
    return AdapterInfo(one.name, one.rank, one.targets, one.key.hex(), standing.requests, not standing.loaded)
