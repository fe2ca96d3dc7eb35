"""Opens model folders: those that `isthmus train` writes, those that Hugging Face publishes, and folders of adapters in
PEFT's layout, which name the model that they adapt. A GGUF file is opened as the folder that it was made from."""

from __future__ import annotations

import dataclasses
import filecmp
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from isthmus.errors import ConfigError
from isthmus.model.config import LoraConfig, ModelConfig
from isthmus.model.execution import DEFAULT_EXECUTION, Execution
from isthmus.model.process.files import appearing, present, read_json, read_json_if_present
from isthmus.model.text.added_tokens import declared_tokens
from isthmus.model.text.chat import ChatTemplate, special_tokens
from isthmus.model.text.endings import end_ids, turn_end, unheeded_flags
from isthmus.model.text.stops import MAX_STOP_CHARACTERS, MAX_STOPS
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.transformer import Params, abstract_params
from isthmus.model.weights.checkpoint import CheckpointSource
from isthmus.model.weights.companions import PUBLISHED_CONFIG
from isthmus.model.weights.gguf.unpack import unpack
from isthmus.model.weights.hub import FolderOptions, find_folder, is_gguf, name_of
from isthmus.model.weights.huggingface.adapter_config import ADAPTER_CONFIG, base_folder, is_adapter_folder
from isthmus.model.weights.huggingface.adapters import load_adapter
from isthmus.model.weights.huggingface.coded.files import open_tensors
from isthmus.model.weights.huggingface.families import Family, read_fields
from isthmus.model.weights.huggingface.fields import Fields
from isthmus.model.weights.huggingface.files import INDEX, SINGLE, WeightFiles
from isthmus.model.weights.huggingface.integers import Kept
from isthmus.model.weights.huggingface.load import PublishedSource, check_size, integer_matrices
from isthmus.model.weights.load import OnProgress, Source, Transform, load_params
from isthmus.model.weights.lora import Adapter, AdapterSource, Merge, side_by_side
from isthmus.model.weights.quantization import Quantize, formats, rules_for
from isthmus.model.weights.writer import write_folder

MAX_NAME = 128
"""Most characters of an adapter's name"""
MIN_REPETITION, MAX_REPETITION = float(np.float32(1e-6)), 10.0
"""Bounds of a repetition penalty, as float32 holds them: a logit that is divided by less may become infinite"""


@dataclass(frozen=True)
class GenerationDefaults:
    """The sampling settings that generation_config.json recommends. None recommends nothing, and the server decides."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_strings: tuple[str, ...] = ()
    """Strings that end a text"""
    ignored: tuple[str, ...] = ()
    """Recommended settings that are not supported, each as NAME=VALUE"""


@dataclass(frozen=True)
class ModelFolder:
    """A model folder as it is known before any array is read."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    generation: GenerationDefaults
    family: Family | None
    """The family of a published model; None for a folder of our own"""
    weights: WeightFiles | None = None
    """The tensors of a published folder or of a GGUF file; None for a folder of our own. For a GGUF file, `path` is a
    temporary folder with the file's other contents, which is deleted when the process ends"""
    adapter: Path | None = None
    """The folder of the adapter, where one was opened; `path` is then the folder of its base model"""
    factors: Adapter | None = None
    """The adapter that this folder holds"""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    """Adapters of this model by their names, of which each request chooses one, or none"""
    quantize: tuple[str, ...] = ()
    """The rules by which matrices are quantized when they are loaded. Matrices that are already integers are not
    affected"""
    kept_integers: Mapping[str, Kept] = field(default_factory=dict)
    """The matrices of a published folder that keep the integers of its files. `quantize` has rules for them as well"""
    execution: Execution = DEFAULT_EXECUTION
    """How the model is to be computed, which the folder doesn't say"""
    ignore_field: tuple[str, ...] = ()
    """The fields of a published config.json that are ignored, also where the file is read again"""
    warnings: tuple[str, ...] = ()
    """What the user should be told: what was ignored, and what the folder's author may not have meant"""

    @property
    def name(self) -> str:
        return name_of(self.adapter or self.path)

    @property
    def nbytes(self) -> int:
        """The size of a published model's weights on disk, in bytes; 0 means unknown."""
        return 0 if self.weights is None else self.weights.nbytes

    @property
    def source(self) -> Path:
        """The folder or the GGUF file to open to get this model again."""
        return self.path if self.weights is None else self.weights.folder

    @property
    def end_id(self) -> int | None:
        """The id of the token that ends a text in training: eos_token of tokenizer_config.json, or else the first id
        that ends generation."""
        name = special_tokens(self.path).get("eos_token")
        spelt = None if name is None else self.tokenizer.token_id(name)
        candidates = (spelt, *_end_ids(self.path), self.tokenizer.eos_id)
        return next((token for token in candidates if token in self.tokenizer.eos_ids), None)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should be told: the warnings, and how matrices that are not stored as plain numbers are
        handled."""
        whole = {kept.name for kept in self.kept_integers.values()}
        said = None if self.weights is None else self.weights.described(whole)
        return self.warnings if said is None else (*self.warnings, f"{self.source}: {said}")

    def keeping(self, rules: tuple[str, ...]) -> ModelFolder:
        """Returns this folder as serving loads it. `rules` say which matrices are quantized. Matrices that are integers
        in the files stay so where one of our formats holds them exactly, unless the rules ask for fewer bits."""
        if self.family is None or self.weights is None or self.adapter is not None:
            return dataclasses.replace(self, quantize=rules)
        wanted = formats(self.config, rules)
        found = integer_matrices(self.weights, self.family, self.config)
        kept = {
            path: each for path, each in found.items() if path not in wanted or wanted[path].bits >= each.exact.bits
        }
        kinds = rules_for({path: each.kind for path, each in kept.items()})
        return dataclasses.replace(self, quantize=(*kinds, *rules), kept_integers=kept)

    def with_config(self, **changes: Any) -> ModelFolder:
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def load_params(
        self,
        mesh: Mesh,
        dtype: str | None = None,
        on_progress: OnProgress = lambda size: None,
        *,
        stacked: bool = False,
        merge_adapter: bool = False,
        transforms: Sequence[Transform] = (),
    ) -> Params:
        """Loads the parameters over `mesh`, in either layout, and calls on_progress(bytes) as they are read.

        dtype: the dtype that matrices are kept in; None is float32. merge_adapter: whether to add the adapter to the
        kernels that it adapts. This is also done where `config` has no lora. The parameters are then those of `config`
        without lora. transforms: further changes to each parameter as soon as it is read, after quantization. Raises
        ConfigError or CheckpointError for a folder that doesn't hold the parameters.
        """
        assert not (self.quantize and stacked), "rules speak of single layers"
        config, changes = self.config, list(transforms)
        if self.quantize:
            changes.insert(0, Quantize(config, self.quantize))
        source = self._source(mesh)
        if self.factors is not None and (merge_adapter or not config.lora.rank):
            changes.insert(0, Merge(self.factors.factors, self.factors.lora.scale))
            config = dataclasses.replace(config, lora=LoraConfig())
        elif self.factors is not None:
            if self.factors.lora != config.lora:
                raise ConfigError(f"{self.adapter} holds an adapter of {self.factors.lora}, not of {config.lora}")
            source = AdapterSource(source, self.factors.factors)
        elif config.lora.adapters:
            source = AdapterSource(source, side_by_side(config, self.adapters.values()))
        return load_params(source, abstract_params(config, mesh, stacked=stacked, dtype=dtype), changes, on_progress)

    def save(self, target: Path, params: Params) -> None:
        """Writes a folder of ours with `params`, the parameters of `config` in either layout, and with the files that
        belong to this model. The folder appears once all of it is written. Raises ConfigError where `target` exists or
        can't be created."""
        with appearing(target) as partial:
            partial.mkdir()
            write_folder(partial, self, params)

    def _source(self, mesh: Mesh) -> Source:
        """The source of the parameters without those of an adapter."""
        apart = self.factors is not None or self.config.lora.adapters > 0
        config = dataclasses.replace(self.config, lora=LoraConfig()) if apart else self.config
        if self.family is None or self.weights is None:
            return CheckpointSource(self.path, config, mesh)
        return PublishedSource(self.weights, self.family, config, mesh, self.kept_integers)


def open_folder(path: Path, options: FolderOptions | None = None) -> ModelFolder:
    """Opens a model folder and reads all of it except a model's weights. path: a folder, a GGUF file, or a name like
    Org/Name in the local Hugging Face cache.

    A folder with adapter_config.json is an adapter's, as in transformers, even if it also holds the model that it
    adapts. Raises ConfigError when the folder is neither a model's nor an adapter's, when something that it says isn't
    supported, or when its files can't hold what it says.
    """
    options = options or FolderOptions()
    path = find_folder(path, download=options.download)
    if is_adapter_folder(path):
        return _open_adapter(path, options)
    if options.base is not None:
        raise ConfigError(f"--base {options.base}: {path} is no adapter, and has no base model")
    return _open_model(path, options)


def _open_adapter(path: Path, options: FolderOptions) -> ModelFolder:
    """Opens an adapter's folder. The tokenizer and the chat template are the adapter's where its folder has them, and
    else its base model's."""
    where = _base_of(path, options)
    base = _open_model(where, options, path if present(path / "tokenizer.json") else None)
    if base.config.quantization:
        raise ConfigError(f"{where} is quantized, and {path} adapts it: adapt the model that it was made from")
    if base.config.lora.rank:
        raise ConfigError(f"{where} has adapters itself (model.lora in config.json), and {path} adapts it")
    chat = ChatTemplate.load(path) or base.chat
    if chat is not base.chat and not present(path / "tokenizer_config.json"):
        raise ConfigError(f"{path} has a chat template without the tokenizer_config.json that names its special tokens")
    base.tokenizer.eos_ids |= turn_end(base.tokenizer, chat)
    adapter = load_adapter(path, base)
    warnings = base.warnings
    if where == path:
        warnings += (f"{path} holds an adapter beside the model, and it is applied: to leave it out, move "
                     f"{ADAPTER_CONFIG} elsewhere",)  # fmt: skip
    folder = dataclasses.replace(base, adapter=path, factors=adapter, chat=chat, warnings=warnings)
    folder = folder.with_config(lora=adapter.lora)
    folder.config.validate()
    return folder


def open_adapters(base: ModelFolder, folders: Mapping[str, Path], options: FolderOptions | None = None) -> ModelFolder:
    """Returns `base` with adapters, by the names that requests call them. They share its tokenizer and chat template.
    Raises ConfigError, naming the adapter, for one that doesn't fit the model or whose settings aren't supported."""
    options, found, warnings = options or FolderOptions(), {}, list(base.warnings)
    for name, where in folders.items():
        check_adapter_name(base, name)
        try:
            found[name], said = read_adapter(find_folder(where, download=options.download), base)
            warnings += said
        except ConfigError as error:
            raise ConfigError(f"adapters: {name}={where} can't be had beside {base.name}: {error}") from None
    return dataclasses.replace(base, adapters=found, warnings=tuple(warnings))


def check_adapter_name(base: ModelFolder, name: str) -> None:
    """Raises ConfigError for what can't be the name of an adapter of `base`."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ConfigError(f"adapters: {name!r:.160} must be a name of at most {MAX_NAME} printable characters")
    if name == base.name:
        raise ConfigError(f"adapters: {name!r} is the model's own name")


def read_adapter(folder: Path, base: ModelFolder, most_rank: int | None = None) -> tuple[Adapter, tuple[str, ...]]:
    """Returns the adapter of `base` that a folder holds, and warnings of what else it holds, which isn't used. Raises
    ConfigError for one that doesn't fit the model or whose settings aren't supported. most_rank: as in `load_adapter`.
    """
    if not is_adapter_folder(folder):
        raise ConfigError(f"{folder} has no {ADAPTER_CONFIG}: it is no adapter's folder")
    adapter, unused = load_adapter(folder, base, most_rank), ", ".join(_unused(folder, base))
    return adapter, ((f"{folder} has {unused}: not used, because adapters share those of the model",) if unused else ())


def _unused(folder: Path, base: ModelFolder) -> Iterator[str]:
    """What else an adapter's folder holds, where it isn't as the base model's."""
    tokenizers = [each / "tokenizer.json" for each in (folder, base.path)]
    if all(map(present, tokenizers)) and not filecmp.cmp(tokenizers[0], tokenizers[1], shallow=False):
        yield "another tokenizer"
    chat = ChatTemplate.load(folder)
    if chat is not None and (base.chat is None or chat.source != base.chat.source):
        yield "another chat template"


def _base_of(path: Path, options: FolderOptions) -> Path:
    """The folder of the base model of the adapter in `path`."""
    if options.base is not None:
        base = find_folder(options.base, download=options.download)
    elif present(path / SINGLE) or present(path / INDEX):
        return path
    else:
        base = base_folder(path, options.download)
    if is_adapter_folder(base):
        raise ConfigError(f"{base} is an adapter itself; the base of {path} must be a model's folder")
    return base


def _open_model(path: Path, options: FolderOptions, tokenizer_folder: Path | None = None) -> ModelFolder:
    """tokenizer_folder: where to read the tokenizer; None is the model's folder."""
    weights: WeightFiles | None = None
    source = path / "config.json"  # the file that errors name
    if is_gguf(path):
        unpacked = unpack(path, options.ignore_field)
        source, path, weights = path, unpacked.folder, unpacked.files
    fields = Fields(read_json(path / "config.json"), source, options.ignore_field)
    published = "model_type" in fields
    family, config = read_fields(fields) if published else (None, ModelConfig.load(path / "config.json"))
    if family is not None:
        weights = weights or open_tensors(path, family.method)
        check_size(weights, config)
    tokenizer_folder = tokenizer_folder or path
    tokenizer = Tokenizer.load(tokenizer_folder / "tokenizer.json", declared_tokens(tokenizer_folder))
    chat = ChatTemplate.load(path)
    if published or present(path / PUBLISHED_CONFIG):
        # A published tokenizer may have ids that the model has no embedding for (Gemma 3). They can't be used.
        tokenizer.vocab_size = min(tokenizer.vocab_size, config.vocab_size)
        spelt = special_tokens(tokenizer_folder).get("eos_token")
        tokenizer.eos_ids = end_ids(_end_ids(path), spelt, tokenizer, chat)
    elif tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    else:
        tokenizer.eos_ids |= turn_end(tokenizer, chat)
    return ModelFolder(
        path,
        config,
        tokenizer,
        chat,
        _generation(path),
        family,
        weights,
        ignore_field=tuple(options.ignore_field),
        warnings=(*fields.warnings, *unheeded_flags(tokenizer_folder, tokenizer)),
    )


def _end_ids(path: Path) -> list[int]:
    """The ids that end a text: those in generation_config.json, or else those in the published config.json."""
    for name in ("generation_config.json", "config.json", PUBLISHED_CONFIG):
        ends = read_json_if_present(path / name).get("eos_token_id")
        if ends is None:
            continue
        ends = ends if isinstance(ends, list) else [ends]
        if not all(type(token) is int and token >= 0 for token in ends):
            raise ConfigError(f"{path / name}: eos_token_id={ends!r} must be a token id or a list of them")
        return ends
    return []


def _generation(path: Path) -> GenerationDefaults:
    """Reads generation_config.json as transformers does. A file without do_sample recommends greedy decoding, whatever
    it says about temperature and filters; its repetition_penalty counts all the same. A missing file recommends
    nothing."""
    if not present(path / "generation_config.json"):
        return GenerationDefaults()
    values = read_json_if_present(path / "generation_config.json")
    neutral = {
        "no_repeat_ngram_size": 0,
        "typical_p": 1.0,
        "num_beams": 1,
        "length_penalty": 1.0,
    }
    ignored = tuple(
        f"{name}={values[name]}" for name, off in neutral.items() if values.get(name, off) not in (off, None)
    )
    stops = _stop_strings(path / "generation_config.json", values.get("stop_strings"))

    def number(name: str, low: float, high: float) -> Any:
        value = values.get(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not low <= value <= high:
            raise ConfigError(f"{path / 'generation_config.json'}: {name}={value!r} must be {low:g} to {high:g}")
        return value

    penalty = number("repetition_penalty", MIN_REPETITION, MAX_REPETITION)
    if not values.get("do_sample", False):
        return GenerationDefaults(temperature=0.0, repetition_penalty=penalty, stop_strings=stops, ignored=ignored)
    top_k = number("top_k", 0, 1 << 30)
    return GenerationDefaults(
        number("temperature", 0, 100), number("top_p", 1e-6, 1), None if top_k is None else int(top_k),
        number("min_p", 0, 1), penalty, stops, ignored,
    )  # fmt: skip


def _stop_strings(source: Path, value: Any) -> tuple[str, ...]:
    """The strings of stop_strings, which is null, one string or a list of them. Raises ConfigError."""
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > MAX_STOPS:
        raise ConfigError(f"{source}: stop_strings={value!r:.80} must be a string or a list of at most {MAX_STOPS}")
    for string in strings:
        if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            raise ConfigError(
                f"{source}: stop_strings={value!r:.80} must hold strings of 1 to {MAX_STOP_CHARACTERS} characters"
            )
    return tuple(strings)
