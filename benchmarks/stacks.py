"""Everything that is timed beside Isthmus, as data: which inference stacks there are, how each is started, alone and as
a server, and whom it meets.

A stack is an engine with its weights in one type. Those that store a weight in as many bits form a class; Isthmus'
ratio is against the fastest of its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from isthmus.benchmarks.processes import BenchError, module
from isthmus.errors import ConfigError
from isthmus.model.config import Dtype, ModelConfig
from isthmus.model.process.resources import usable_cpus
from isthmus.serve.engine.config import EngineConfig

EngineName = Literal["isthmus", "llama", "vllm", "transformers"]
PEERS = Path(__file__).parent / "peers"
VLLM_BLOCK = 128
"""Tokens of a block of vLLM's cache on CPUs"""


@dataclass(frozen=True)
class Stack:
    """One engine, its weights in one type."""

    engine: EngineName
    kind: str
    """The weights' type, as the result names it"""
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
    """The Python of the environment with transformers"""
    vllm_python: Path = Path(".venv-vllm/bin/python")
    """The Python of the environment with vLLM"""
    llama: Path = Path(".peers-llama")
    """The folder with llama.cpp's bin"""

    def python(self, engine: EngineName) -> str:
        """The Python that runs a peer's script. Raises BenchError."""
        if engine == "vllm":
            return _existing(self.vllm_python, "make peers-vllm")
        return _existing(self.peers_python, "make peers")

    def llama_program(self, name: str) -> str:
        """One of llama.cpp's programs. Raises BenchError."""
        return _existing(self.llama / "bin" / name, "make peers-llama")


def _existing(path: Path, target: str) -> str:
    if not path.is_file():
        raise BenchError(f"{path} does not exist; `{target}` builds it")
    return str(path.absolute())


@dataclass(frozen=True)
class Sizes:
    """What every engine of a comparison is started for."""

    sequences: int
    context: int
    """Tokens of a sequence, prompt and completion together"""

    @property
    def engine(self) -> EngineConfig:
        """Ours: room for each sequence's whole context, and no prompt that is known already."""
        pages = 1 + self.sequences * -(-self.context // EngineConfig.page_size)
        return EngineConfig(
            max_sequences=self.sequences,
            context_length=self.context,
            pages=pages,
            max_waiting=4096,
            prefix_cache=False,
        )


@dataclass(frozen=True)
class Start:
    """All that starting a stack depends on."""

    stack: Stack
    model: Path
    """The published folder, absolute"""
    config: ModelConfig
    """The model's"""
    sizes: Sizes
    installed: Installed

    @property
    def gguf(self) -> Path:
        """Where make_gguf.py put the model for this stack."""
        return self.model.with_name(f"{self.model.name}-{self.stack.kind}.gguf")

    @property
    def child(self) -> list[str]:
        """The command of the stack's child, which answers as protocol.py says. Raises BenchError."""
        return ENGINES[self.stack.engine].child(self.installed)

    @property
    def load(self) -> dict[str, Any]:
        """The arguments of the child's `load`."""
        asked = {"model": str(self.model), "dtype": self.stack.dtype}
        asked |= {"quantize": self.stack.quantize} if self.stack.engine == "isthmus" else {}
        return {**asked, "max_sequences": self.sizes.sequences, "context": self.sizes.context}

    def server(self, port: int) -> list[str]:
        """The command of the stack's server on that port of the loopback. Raises BenchError."""
        command = ENGINES[self.stack.engine].server
        assert command is not None, f"{self.stack.name} has no server"
        return command(self, port)

    def weight_bytes(self) -> float:
        """Bytes of weights that a step of a peer reads: all that is stored, but of an embedding that is not the head
        only a few rows. llama.cpp's are its file's."""
        config = self.config
        looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
        if self.stack.engine == "llama":
            return self.gguf.stat().st_size - looked_up * self.stack.bytes_per_weight
        return (config.parameters - looked_up) * self.stack.bytes_per_weight


def serve_flags(model: Path, dtype: Dtype | None, tp: int, engine: EngineConfig) -> list[str]:
    """The command line of `isthmus serve` for these settings, but for the port."""
    flags = ["--model", str(model), "--tp", str(tp), "--dtype", dtype or "auto", "--report-cached-tokens"]
    for item in fields(engine):
        name, value = item.name.replace("_", "-"), getattr(engine, item.name)
        if isinstance(value, bool):
            flags.append(f"--engine.{name}" if value else f"--engine.no-{name}")
        else:
            flags += [f"--engine.{name}", str(value)]
    return flags


def isthmus_command(flags: list[str], port: int) -> list[str]:
    """The command of `isthmus serve FLAGS` on that port of the loopback."""
    return [*module("isthmus.commands.main"), "serve", *flags, "--port", str(port)]


def _isthmus_server(start: Start, port: int) -> list[str]:
    quantize = [] if start.stack.quantize == "none" else ["--quantize", start.stack.quantize]
    return isthmus_command([*serve_flags(start.model, "bfloat16", 1, start.sizes.engine), *quantize], port)


def _llama_server(start: Start, port: int) -> list[str]:
    """A slot a sequence, each with room for a whole one; batches that mix prompts and steps are its default."""
    if not start.gguf.is_file():
        raise BenchError(f"{start.gguf} does not exist; make_gguf.py makes it")
    threads, sequences = str(usable_cpus()), start.sizes.sequences
    sizes = ["-t", threads, "-tb", threads, "-np", str(sequences), "-c", str(sequences * start.sizes.context)]
    caches = ["--no-cache-prompt", "--cache-ram", "0", "--no-webui"]
    program = start.installed.llama_program("llama-server")
    return [program, "-m", str(start.gguf), "--host", "127.0.0.1", "--port", str(port), *sizes, *caches]


def _vllm_server(start: Start, port: int) -> list[str]:
    """Its OpenAI server, a cache for as many sequences as ours. The `vllm` program looks for a package of that name,
    which the build for CPUs is not."""
    config, sizes, dtype = start.config, start.sizes, start.stack.dtype
    token = 2 * config.layers * config.kv_heads * config.head_dim * (4 if dtype == "float32" else 2)
    cache = (sizes.sequences * -(-sizes.context // VLLM_BLOCK) + 1) * VLLM_BLOCK * token
    limits = ["--max-model-len", str(sizes.context), "--max-num-seqs", str(sizes.sequences)]
    where = ["--host", "127.0.0.1", "--port", str(port), "--no-enable-prefix-caching"]
    program = [start.installed.python("vllm"), "-m", "vllm.entrypoints.openai.api_server"]
    model = ["--model", str(start.model), "--dtype", dtype]
    return [*program, *model, *limits, *where, "--kv-cache-memory-bytes", str(cache)]


def _llama_child(installed: Installed) -> list[str]:
    installed.llama_program("llama-batched-bench")
    return [installed.python("llama"), str(PEERS / "llama_cpp.py"), str(installed.llama)]


@dataclass(frozen=True)
class Engine:
    """How an engine is started; http_api.py says how its server is asked."""

    child: Callable[[Installed], list[str]]
    server: Callable[[Start, int], list[str]] | None = None
    """The server's command on a port of the loopback"""
    environment: dict[str, str] = field(default_factory=dict)
    """What the server wants set"""


ENGINES: dict[EngineName, Engine] = {
    "isthmus": Engine(lambda installed: module("isthmus.benchmarks.engine"), _isthmus_server),
    "llama": Engine(_llama_child, _llama_server),
    "vllm": Engine(
        lambda installed: [installed.python("vllm"), str(PEERS / "vllm_cpu.py")],
        _vllm_server,
        {"OMP_NUM_THREADS": str(usable_cpus()), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    ),
    "transformers": Engine(lambda installed: [installed.python("transformers"), str(PEERS / "transformers_torch.py")]),
}
SERVERS = tuple(name for name, stack in STACKS.items() if ENGINES[stack.engine].server)
"""The stacks that have one"""
