"""The settings of a training run. The command line is generated from these classes."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from isthmus.errors import ConfigError
from isthmus.model.config import EXECUTION_FIELDS, PRESETS, ModelConfig
from isthmus.model.execution import Execution
from isthmus.model.sharding import MeshShape


@dataclass(frozen=True)
class DataConfig:
    """How text is tokenized, cut into sequences and held out."""

    tokenizer: Path | None = None
    """A tokenizer.json to use; by default a byte-level BPE is trained on the data. Not with --init"""
    vocab_size: int = 4096
    """Number of tokens of the tokenizer that is trained, at least 257"""
    heldout_fraction: float = 0.02
    """Share of the text, between 0 and 1, that is kept for the held-out loss: documents chosen by their hash, and the
    ends of long ones"""
    seq: int = 512
    """Tokens per sequence, at most the model's context length; documents are packed into sequences, are cut where one
    ends, and never attend to one another"""
    parse_special: bool = False
    """Read a special token that is spelt out in a text, such as <|im_start|>, as that token and not as text; in
    conversations it always is that token"""

    def fitted(self, context_length: int) -> DataConfig:
        """The same with sequences that fit into a model's context."""
        return dataclasses.replace(self, seq=min(self.seq, context_length))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with gradient clipping and a learning-rate schedule."""

    lr: float = 1e-3
    """Peak learning rate"""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """What follows the warm-up: cosine decay, or (wsd) a constant rate and then linear decay over `decay_fraction`"""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0; a run that isn't longer warms up for a tenth of its steps"""
    decay_fraction: float = 0.2
    """Share of the steps, at the end, in which the learning rate decays; only for wsd"""
    final_lr: float = 0.1
    """The last learning rate as a share of the peak"""
    beta1: float = 0.9
    """Decay rate of AdamW's running mean of gradients, below 1"""
    beta2: float = 0.95
    """Decay rate of AdamW's running mean of squared gradients, below 1"""
    weight_decay: float = 0.1
    """AdamW's weight decay on matrices; norms and biases have none"""
    clip: float = 1.0
    """Largest norm of the whole gradient; a larger gradient is scaled down to it"""
    correction_rate: float = 0.001
    """How far each step moves a router's correction, up for experts below the mean load, else down (DeepSeek-V3)"""

    def fitted(self, steps: int) -> OptimizerConfig:
        """The same, with a warm-up of a tenth of the steps if it would take all of them."""
        return self if self.warmup_steps < steps else dataclasses.replace(self, warmup_steps=steps // 10)

    def validate(self) -> None:
        """Raises ConfigError naming the field that can't work."""
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be positive and finite")
        for name in ("warmup_steps", "weight_decay", "final_lr", "correction_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be finite and not negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        if not 0 < self.decay_fraction <= 1:
            raise ConfigError(f"optimizer.decay_fraction={self.decay_fraction} must be in (0, 1]")


@dataclass(frozen=True)
class TrainConfig:
    """Trains a transformer on text."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files and folders of text; a .jsonl or .json file holds documents, which are objects with the field "text" or,
    with --init, "messages"; all may be gzipped"""
    out: Path = Path("runs/latest")
    """The model folder to write: configuration, tokenizer, checkpoints, metrics"""
    init: Path | None = None
    """A model to start from: a folder of ours or as Hugging Face publishes it, or Org/Name in its local cache"""
    ignore_field: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A field of --init's config.json to ignore, though the model may then be another; may be given several times"""
    download: bool = False
    """Fetch an --init named Org/Name from huggingface.co if the local cache doesn't have it"""
    preset: str = "5m"
    """Model size to start from, one of those listed above; each --model.* overrides it"""
    model: ModelConfig = PRESETS["5m"]
    execution: Annotated[Execution, tyro.conf.OmitArgPrefixes] = field(default_factory=Execution)
    text: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 1000
    """Number of training steps, each of one batch"""
    batch: int = 16
    """Sequences per step, over all devices and all accumulated parts"""
    accumulate: int = 1
    """Number of parts in which a batch is computed, one after the other, to need less memory; it must divide --batch"""
    mesh: str = ""
    """Number of devices for each kind of parallelism, such as dp=2,fsdp=2,tp=2; empty means all devices as fsdp"""
    kernels: str = "auto"
    """The implementation of each operation: auto takes this machine's kernels if they make training faster; reference
    takes none; the name of kernels takes those, and is an error if they can't run: cpu gives log-probabilities the bits
    that serving gives them. Single operations may differ, after commas, as in cpu,linear=reference"""
    seed: int = 0
    """Decides the random initial parameters and the order of the data"""
    eval_every: int = 250
    """Steps between two evaluations of the held-out loss; 0 means only one at the end"""
    eval_batches: int = 16
    """Held-out batches that an evaluation reads; the one at the end reads all"""
    checkpoint_every: int = 250
    """Steps between two checkpoints; the run also saves one at its end"""
    keep: int = 2
    """How many of the newest checkpoints to keep"""
    log_every: int = 10
    """Steps between two measurements of speed in metrics.jsonl, which has the loss of every step, and how many losses
    the printed one is the mean of"""
    resume: bool = False
    """Go on from the newest checkpoint in --out, with the settings that were saved there"""

    def validate(self) -> None:
        """Raises ConfigError naming the field that can't work."""
        if not self.data:
            raise ConfigError("data: name at least one text file, folder or .jsonl file")
        at_least_one = (
            "steps",
            "batch",
            "accumulate",
            "checkpoint_every",
            "keep",
            "log_every",
            "eval_batches",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("eval_every", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise ConfigError(f"batch={self.batch} must be a multiple of accumulate={self.accumulate}")
        if not 1 <= self.text.seq <= self.model.context_length:
            raise ConfigError(f"text.seq={self.text.seq} must be 1 to model.context_length={self.model.context_length}")
        if not 0 < self.text.heldout_fraction < 1:
            raise ConfigError(f"text.heldout_fraction={self.text.heldout_fraction} must lie between 0 and 1")
        self.optimizer.validate()
        self.model.validate()
        parts = self.mesh_shape.data
        if (self.batch // self.accumulate) % parts:
            part = self.batch // self.accumulate
            raise ConfigError(f"batch / accumulate = {part} can't be split over dp x fsdp x ep = {parts} devices")

    @property
    def mesh_shape(self) -> MeshShape:
        if self.mesh:
            return MeshShape.parse(self.mesh)
        import jax

        return MeshShape(fsdp=len(jax.devices()))

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        del fields["execution"]["kernels"]  # they are chosen by `kernels` on the machine that it runs on
        return json.dumps(fields, indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """The inverse of `to_json`, also for what earlier versions wrote. Raises ValueError, TypeError or KeyError for
        other text."""
        fields: dict[str, Any] = json.loads(text)
        model = fields["model"]
        if "execution" not in fields:  # in earlier versions it was part of the model
            fields["execution"] = {name: model[name] for name in EXECUTION_FIELDS if name in model}
            if "correction_rate" in (mixture := model.get("mixture", {})):
                fields["optimizer"]["correction_rate"] = mixture["correction_rate"]
        tokenizer, init = fields["text"]["tokenizer"], fields.get("init")
        return cls(
            **{
                **fields,
                "data": tuple(fields["data"]),
                "out": Path(fields["out"]),
                "init": Path(init) if init else None,
                "ignore_field": tuple(fields.get("ignore_field", ())),
                "model": ModelConfig.from_dict(model),
                "execution": Execution(**fields["execution"]),
                "text": DataConfig(**{**fields["text"], "tokenizer": Path(tokenizer) if tokenizer else None}),
                "optimizer": OptimizerConfig(**fields["optimizer"]),
            }
        )


FREE_ON_RESUME = (
    "out",
    "download",
    "resume",
    "mesh",
    "kernels",
    "log_every",
    "keep",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
)
"""Settings that may change when a run is resumed: none of them changes a parameter, except that another mesh or other
kernels round differently. `steps` may also change if the learning rates of the steps until now stay the same
(train/resume.py)."""


def check_resumable(saved: TrainConfig, asked: TrainConfig) -> None:
    """Raises ConfigError naming the first setting that was changed and would make the resumed run another run."""
    before, now = flat(dataclasses.asdict(saved)), flat(dataclasses.asdict(asked))
    for name, value in before.items():
        if name not in (*FREE_ON_RESUME, "steps") and now[name] != value:
            raise ConfigError(f"{name} can't change on --resume: it was {value!r}. Start a new run with another --out")


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Makes one level of several: {"a": {"b": 1}} becomes {"a.b": 1}."""
    named: dict[str, Any] = {}
    for name, value in fields.items():
        named |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return named
