"""Everything that is timed beside Isthmus: which inference stacks there are, how each is started, and whom it meets.

A stack is an engine with its weights in one type. Those that store a weight in as many bits form a class; Isthmus'
ratio is against the fastest of its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isthmus.benchmarks.child import BenchError, module
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig

Engine = Literal["isthmus", "llama", "vllm", "transformers"]
PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Stack:
    """One engine, its weights in one type."""

    engine: Engine
    kind: str
    """Of the weights, as the result names it"""
    dtype: str
    """As the engine's `load` takes it"""
    weights: Literal["16 bits", "8 bits", "4 bits"]
    """Its class, which float32 of engines that are slow in bfloat16 belongs to"""
    bytes_per_weight: float
    """Nominally: a file may keep some tensors in a wider type"""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Isthmus only"""

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.kind}"


STACKS = {
    stack.name: stack
    for stack in (
        Stack("isthmus", "bf16", "bfloat16", "16 bits", 2),
        Stack("isthmus", "int8", "bfloat16", "8 bits", 1, "int8"),
        Stack("isthmus", "int4", "bfloat16", "4 bits", 0.5, "int4"),
        Stack("llama", "bf16", "bfloat16", "16 bits", 2),
        Stack("llama", "f16", "float16", "16 bits", 2),
        Stack("llama", "q8_0", "q8_0", "8 bits", 34 / 32),
        Stack("llama", "q4_0", "q4_0", "4 bits", 18 / 32),
        Stack("llama", "q4_K_M", "q4_K_M", "4 bits", 144 / 256),
        Stack("vllm", "bf16", "bfloat16", "16 bits", 2),
        Stack("vllm", "f32", "float32", "16 bits", 4),
        Stack("transformers", "bf16", "bfloat16", "16 bits", 2),
        Stack("transformers", "f32", "float32", "16 bits", 4),
    )
}
CLASSES = ("16 bits", "8 bits", "4 bits")


def chosen(names: tuple[str, ...], among: tuple[str, ...] = tuple(STACKS)) -> list[Stack]:
    """The stacks of these names. Raises ConfigError for a name that is none of `among`, or comes twice."""
    for name in names:
        if name not in among:
            raise ConfigError(f"stacks: {name!r} is none of {', '.join(among)}")
    if not names or len(set(names)) < len(names):
        raise ConfigError("stacks must name at least one, and none twice")
    return [STACKS[name] for name in names]


@dataclass(frozen=True)
class Installed:
    """Where `make peers`, `make peers-llama` and `make peers-vllm` put them."""

    peers_python: Path = Path(".venv-peers/bin/python")
    """Of the environment with transformers"""
    vllm_python: Path = Path(".venv-vllm/bin/python")
    """Of the environment with vLLM"""
    llama: Path = Path(".peers-llama")
    """The folder with llama.cpp's bin"""

    def command(self, stack: Stack) -> list[str]:
        """What starts the stack's child, which answers as benchmarks/peers/protocol.py says. Raises BenchError."""
        if stack.engine == "isthmus":
            return module("isthmus.benchmarks.engine_child")
        if stack.engine == "llama":
            self.program("llama-batched-bench")
            return [str(_existing(self.peers_python, "make peers")), str(PEERS / "llama_cpp.py"), str(self.llama)]
        python, script = (
            (_existing(self.vllm_python, "make peers-vllm"), "vllm_cpu.py")
            if stack.engine == "vllm"
            else (_existing(self.peers_python, "make peers"), "transformers_torch.py")
        )
        return [str(python), str(PEERS / script)]

    def program(self, name: str) -> Path:
        """One of llama.cpp's. Raises BenchError."""
        return _existing(self.llama / "bin" / name, "make peers-llama")


def _existing(path: Path, target: str) -> Path:
    if not path.is_file():
        raise BenchError(f"{path} does not exist; `{target}` builds it")
    return path.absolute()


def load_question(stack: Stack, model: Path, max_sequences: int, context: int) -> dict[str, Any]:
    """The fields of `load`."""
    fields = {"model": str(model), "dtype": stack.dtype, "max_sequences": max_sequences, "context": context}
    return {**fields, "quantize": stack.quantize} if stack.engine == "isthmus" else fields


def gguf_path(stack: Stack, model: Path) -> Path:
    """Where make_gguf.py put the model for this stack."""
    return model.resolve().with_name(f"{model.resolve().name}-{stack.kind}.gguf")


def weight_bytes(stack: Stack, config: ModelConfig, model: Path) -> float:
    """Bytes of weights that a step of a peer reads: all that is stored, but of an embedding that is not the head only a
    few rows. llama.cpp's are its file's."""
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
    if stack.engine == "llama":
        return gguf_path(stack, model).stat().st_size - looked_up * stack.bytes_per_weight
    return (config.parameters - looked_up) * stack.bytes_per_weight
