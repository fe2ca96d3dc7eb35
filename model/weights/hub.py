"""Finds a model on this machine: a folder, a GGUF file, or a name like Org/Name in the local Hugging Face cache. The
network is used only when a download is asked for."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import ConfigError
from isthmus.model.process.files import present, shortened

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
_NOT_WANTED = ("*/*.json", "*/*.safetensors", "consolidated*")
"""Patterns of files that hold the same weights in other layouts."""
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class FolderOptions:
    """How a model folder is found and read."""

    base: Path | None = None
    """Folder of an adapter's base model, or its name Org/Name, in place of the one that the adapter names"""
    ignore_field: tuple[str, ...] = ()
    """Field of config.json, or key of GGUF metadata, to read as if absent; this may change what the model computes"""
    download: bool = False
    """Fetch a model named Org/Name from huggingface.co where the local Hugging Face cache lacks some of it"""


def is_hub_name(name: str) -> bool:
    """Whether `name` can be a model's name on the hub: Org/Name."""
    return _NAME.fullmatch(name) is not None and ".." not in name and "--" not in name


def find_folder(path: Path, *, download: bool = False, revision: str | None = None) -> Path:
    """Returns the model folder at `path`, or the one that the local Hugging Face cache holds for a name like Org/Name.
    The result is a GGUF file where `path` is one, or is a folder without config.json that holds only one GGUF model.

    download: fetches from the hub what the cache lacks. revision: the branch, tag or commit of a model that is given by
    name; None is main. Raises ConfigError, saying what `path` is instead.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, this doesn't raise for a name that is too long
        return _checked_folder(path)
    if is_gguf(path):
        return path
    if present(path):
        raise ConfigError(f"{path} is {_kind_of_file(path)}")
    name = str(path)
    if not is_hub_name(name):
        raise ConfigError(
            f"{shortened(name)}: there is no such folder or GGUF file; a model of a hub is named Org/Name, and "
            "download=True (--download) fetches it"
        )
    return _download(name, revision) if download else _cached(name, revision)


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file whose name ends in .gguf."""
    return path.suffix == ".gguf" and os.path.isfile(path)


def name_of(folder: Path) -> str:
    """The name of the model in `folder`: its name on the hub without the organization where the folder is in the cache,
    else the folder's name."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name


def _checked_folder(path: Path) -> Path:
    if present(path / "config.json") or present(path / "adapter_config.json"):
        return path
    if path.name.startswith("models--") and present(path / "snapshots"):
        name = path.name.removeprefix("models--").replace("--", "/")
        raise ConfigError(
            f"{path} is what the Hugging Face cache keeps of {name}: name the model {name}, or a folder in "
            f"{path / 'snapshots'}"
        )
    for root in (path, path / "hub"):
        names = sorted(each.name for each in root.glob("models--*--*"))
        if names:
            some = ", ".join(name.removeprefix("models--").replace("--", "/") for name in names[:5])
            raise ConfigError(f"{path} is a Hugging Face cache, of several models: name one of them, as {some}")
    # The first part of a split model stands for the whole model.
    files = sorted(each.name for each in path.glob("*.gguf") if not _LATER_PART.search(each.name))
    if len(files) == 1:
        return path / files[0]
    if files:
        raise ConfigError(f"{path} holds several GGUF files: name one of them, as {path / files[0]}")
    raise ConfigError(f"{path} has no config.json and no adapter_config.json: is it a model or an adapter?")


def _kind_of_file(path: Path) -> str:
    if path.is_file():
        return f"a file; name the folder that it is in, {path.parent}"
    return "a link that leads nowhere" if path.is_symlink() else "no folder"


def _cached(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    for file in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):  # otherwise the cache doesn't know it, or knows that it doesn't exist
            return Path(found).parent
    kept = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    if files := sorted(kept.glob("*/*.gguf")):
        raise ConfigError(f"{name}: the Hugging Face cache holds GGUF files of it: name one, as {files[0]}")
    folder = Path(name).parent
    if revision is None and folder.is_dir():  # a slip in a path, rather than a name of the hub
        with contextlib.suppress(OSError):  # a folder that can't be listed holds nothing to suggest
            found = ", ".join(sorted(each.name for each in folder.iterdir() if each.is_dir())[:5])
            raise ConfigError(
                f"{name}: there is no such folder or GGUF file, nor is it in the Hugging Face cache; {folder} holds "
                f"{found or 'no folders'}, and download=True (--download) asks the hub"
            )
    version = "" if revision is None else f" at revision {shortened(revision)}"
    raise ConfigError(
        f"{name}{version}: there is no such folder or GGUF file, and the Hugging Face cache ({constants.HF_HUB_CACHE}) "
        "doesn't have it; download=True (--download) fetches it"
    )


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        wanted, not_wanted = list(_WANTED), list(_NOT_WANTED)
        found = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=not_wanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} can't be downloaded: {shortened(reason)}") from None
    if not present(found / "config.json") and not present(found / "adapter_config.json"):
        raise ConfigError(
            f"{name} has no config.json. From a repository of GGUF files, fetch one, for example with "
            f"`hf download {name} FILE`, and give its path"
        )
    return found
