"""The interface to what is known about a model besides its parameters. Writing a model, or an adapter of it, needs no
more."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from isthmus.model.config import ModelConfig
from isthmus.model.text.chat import ChatTemplate
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.huggingface.families import Family
from isthmus.model.weights.huggingface.files import WeightFiles


class Described(Protocol):
    """A model's configuration, tokenizer and files. `isthmus.model.weights.folder.ModelFolder` implements it and
    documents the properties."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def chat(self) -> ChatTemplate | None: ...
    @property
    def end_id(self) -> int | None: ...
    @property
    def family(self) -> Family | None: ...
    @property
    def weights(self) -> WeightFiles | None: ...
    @property
    def adapter(self) -> Path | None: ...
    @property
    def ignore_field(self) -> tuple[str, ...]: ...
