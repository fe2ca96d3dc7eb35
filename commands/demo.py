"""`isthmus demo`: trains a small model on the source of Python's standard library, serves it and calls it."""

from __future__ import annotations

import contextlib
import lzma
import os
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from isthmus.benchmarks.processes import BenchError
from isthmus.benchmarks.servers import isthmus_server
from isthmus.client import Client
from isthmus.errors import ConfigError, RequestError
from isthmus.model.config import ModelConfig
from isthmus.model.process.progress import working
from isthmus.model.weights.checkpoint import CheckpointError
from isthmus.train.config import DataConfig, OptimizerConfig, TrainConfig
from isthmus.train.documents import read_documents
from isthmus.train.heldout import split
from isthmus.train.loop import Report, TrainError, train
from isthmus.train.metrics import save_curve, terminal_curve
from isthmus.types import SamplingParams

HELP = """Trains a small model on the source of Python's standard library as it is installed, serves it over gRPC, and
streams completions for eight prompts at once."""

# No prompt ends in a space: byte-level BPE joins a space to the word after it, which the model has to choose.
PROMPTS = (
    "def __init__(self",
    "import",
    "class",
    "    def __repr__(self):\n        return",
    "for i in range(",
    "if __name__ ==",
    "    try:\n",
    "from collections import",
)

_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "__pycache__",
    "lib-dynload",
    "ensurepip",
    "pydoc_data",
}
"""Folders that hold no source, or that some systems install Python without, such as its tests"""

CLIENT_SECONDS = 120.0


@dataclass(frozen=True)
class DemoConfig:
    out: Path = Path("demo-out")
    """Folder for the model, its loss curve and its checkpoints; that of an earlier demo is replaced"""
    steps: int = 440
    max_tokens: int = 48
    """Most tokens in each completion"""
    temperature: float = 0.6

    def validate(self) -> None:
        """Raises ConfigError for a setting that is out of range."""
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"temperature={self.temperature} must be 0 to 100")


@dataclass
class Generation:
    """One streamed completion, timed by its client."""

    prompt: str
    text: str = ""
    tokens: int = 0
    first: float = 0.0
    """Seconds to the first token"""
    total: float = 0.0
    reason: str = ""
    chunks: list[str] = field(default_factory=list)


def standard_library() -> tuple[str, ...]:
    """Folders and files of the standard library's Python source."""
    root = Path(sysconfig.get_path("stdlib"))
    entries = (e for e in root.iterdir() if e.name not in _LEFT_OUT and (e.is_dir() or e.suffix == ".py"))
    return tuple(str(e) for e in sorted(entries) if e.is_file() or any(e.rglob("*.py")))


def demo_training(config: DemoConfig) -> TrainConfig:
    model = ModelConfig(
        vocab_size=0, dim=192, layers=4, heads=4, kv_heads=2, head_dim=48, mlp_dim=512, context_length=512
    )
    return TrainConfig(
        data=standard_library(),
        out=config.out,
        preset="demo",
        model=model,
        text=DataConfig(vocab_size=2048, seq=256, heldout_fraction=0.03),
        optimizer=OptimizerConfig(lr=1.5e-3, warmup_steps=50, schedule="wsd", decay_fraction=0.5, final_lr=0.02),
        steps=config.steps,
        batch=4,
        mesh="dp=1",
        eval_every=max(1, config.steps // 6),
        eval_batches=16,
        checkpoint_every=config.steps,
    )


def xz_bits_per_byte(training: TrainConfig) -> float:
    """Bits per byte of the held-out text after `xz -9` has compressed all of it as one stream."""
    heldout = split(list(read_documents(training.data)), training.text.heldout_fraction).heldout
    raw = "".join(document.text for document in heldout).encode()
    return 8 * len(lzma.compress(raw, preset=9)) / len(raw)


def _complete(client: Client, prompt: str, config: DemoConfig, seed: int) -> Generation:
    result = Generation(prompt)
    start = time.perf_counter()
    sampling = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, top_p=0.95, seed=seed)
    for delta in client.stream(prompt, sampling, timeout=CLIENT_SECONDS):
        result.first = result.first or time.perf_counter() - start
        result.chunks.append(delta.text)
        if delta.completion is not None:
            result.tokens, result.reason = delta.completion.completion_tokens, delta.completion.finish_reason
    result.total = time.perf_counter() - start
    result.text = "".join(result.chunks)
    return result


def _watch_pages(client: Client, done: threading.Event) -> int:
    """Returns the most pages that were in use at once until `done` was set."""
    most = 0
    while not done.wait(0.01):
        most = max(most, client.load().pages_in_use)
    return most


def _call(address: str, config: DemoConfig, console: Console) -> None:
    done = threading.Event()
    with Client(address) as client, ThreadPoolExecutor(len(PROMPTS) + 1) as pool:
        client.generate("pass", max_tokens=2)  # sets up the channel, which no prompt's time is to include
        info = client.server_info()
        pages = pool.submit(_watch_pages, client, done)
        start = time.perf_counter()
        try:
            results = list(pool.map(lambda pair: _complete(client, pair[1], config, seed=pair[0]), enumerate(PROMPTS)))
        finally:
            done.set()
        seconds = time.perf_counter() - start
        most_pages = pages.result()
    for result in results:
        code = Syntax(result.prompt + result.text, "python", theme="ansi_dark", background_color="default")
        console.print(Panel(code, title=repr(result.prompt), title_align="left", width=min(100, console.width)))
    tokens = sum(result.tokens for result in results)
    first = sorted(result.first for result in results)
    table = Table(title=f"{len(PROMPTS)} prompts at once, over gRPC", show_header=False)
    for name, value in (
        (
            "time to first token",
            f"{1e3 * first[len(first) // 2]:.0f} ms median, {1e3 * first[-1]:.0f} ms worst",
        ),
        ("output", f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s"),
        (
            "KV cache",
            f"{most_pages} of {info.pages_total} pages in use at most, {info.page_size} tokens each",
        ),
        (
            "compile and warm-up",
            f"{info.compile_seconds:.1f} s and {info.warmup_seconds:.1f} s, {len(info.buckets)} programs",
        ),
    ):
        table.add_row(name, value)
    console.print(table)


def _show_training(report: Report, training: TrainConfig, console: Console) -> None:
    curve = terminal_curve(training.out, width=min(100, console.width), color=console.is_terminal)
    console.print(Text.from_ansi(curve), highlight=False)
    xz = xz_bits_per_byte(training)
    assert report.bits_per_byte is not None
    winner = "the model" if report.bits_per_byte < xz else "xz"
    console.print(
        f"held-out source, bits per byte: model {report.bits_per_byte:.3f}, xz -9 {xz:.3f} ({winner} wins)\n"
        f"trained {report.steps} steps in {report.seconds:.0f} s: "
        f"{report.tokens_per_second:,.0f} tokens/s, MFU {report.mfu:.0%}\n"
        f"loss curve: {save_curve(training.out)}",
        highlight=False,
    )


def run(config: DemoConfig, console: Console) -> None:
    config.validate()
    if config.out.exists():
        if not (config.out / "train.json").is_file():
            raise ConfigError(f"out: {config.out} exists and isn't an earlier demo's; name another folder")
        shutil.rmtree(config.out)
    training = demo_training(config)
    console.rule("train")
    report = train(training, console)
    if report.interrupted:
        raise KeyboardInterrupt
    _show_training(report, training, console)
    console.rule("serve")
    flags = ["--model", str(config.out), "--engine.max-sequences", "8", "--engine.prefill-tokens", "64"]
    log = config.out / "serve.log"
    with contextlib.ExitStack() as stack:
        with working(console, "isthmus serve: compiling"):
            server = stack.enter_context(isthmus_server(flags, log))
        console.print(log.read_text().strip(), highlight=False)
        console.rule("generate")
        _call(server.address, config, console)


def _command() -> str:
    """What starts isthmus in the shell that ran this: its path, where no folder of PATH has it, as after make demo."""
    return "isthmus" if shutil.which("isthmus") else f"{os.path.relpath(sys.executable)} -m isthmus"


def main(argv: Sequence[str]) -> int:
    console = Console(soft_wrap=True)
    config = tyro.cli(DemoConfig, args=list(argv), description=HELP, prog="isthmus demo")
    start = time.perf_counter()
    try:
        run(config, console)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except (ConfigError, OSError) as error:
        console.print(f"isthmus demo: {error}", style="red", markup=False)
        return 2
    except (BenchError, CheckpointError, TrainError, RequestError) as error:
        console.print(f"isthmus demo: {error}", style="red", markup=False)
        return 1
    console.print(
        f"done in {time.perf_counter() - start:.0f} s. Serve it yourself: {_command()} serve --model {config.out}",
        highlight=False,
    )
    return 0
