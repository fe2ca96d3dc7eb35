"""What is known of a model beside its parameters: all that writing it, or an adapter of it, asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from isthmus.model.config import ModelConfig
from isthmus.model.text.chat import ChatTemplate
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.huggingface.families import Family
from isthmus.model.weights.huggingface.files import WeightFiles


class Described(Protocol):
    """A model with its tokenizer and its templates; `isthmus.model.weights.folder.ModelFolder` is one and says what
    each of these is."""

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
