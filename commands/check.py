"""The command `isthmus check`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from isthmus.checks.determinism import Verdict, check, crowd_config, random_arrivals
from isthmus.checks.networks import NETWORKS, Numbers, guests, small_executor, small_params
from isthmus.checks.trained import Learner, learner, why_not_trained
from isthmus.commands.main import near
from isthmus.errors import ConfigError
from isthmus.forms import Choices, JsonSchema, Regex
from isthmus.model.config import ModelConfig
from isthmus.model.device.compilation import enable_compilation_cache
from isthmus.model.ops.kernels import announcement
from isthmus.model.ops.operation import AUTO, REFERENCE
from isthmus.model.parameter import Dtype
from isthmus.model.process.progress import Display, stages
from isthmus.model.sharding import MeshShape
from isthmus.serve.engine.build import build_executor, open_model
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.constraint import Constraint
from isthmus.serve.engine.executor import Executor
from isthmus.serve.prepare.grammar import Grammars

CHECK = "determinism"
USAGE = """usage: isthmus check CHECK [options]

Proves on this machine what Isthmus promises.

  determinism   a request gets the same bits whatever happens around it

isthmus check CHECK --help says more.

examples:
  isthmus check determinism
  isthmus check determinism --model models/llama --requests 1000"""
HELP = """A request with a seed gets the same tokens, and log-probabilities of the same bits, alone and in any batch,
from a cold or a warm cache, preempted or not. Requests of every length and with every option arrive together, some are
cancelled, some ask again what others have asked, pages run short, adapters are loaded and unloaded; then each runs
again alone, a third of them is resumed in the middle, another third has its tokens scored, what the last third drew
goes through the forward pass of training (not with --model, nor with an adapter or integers), and every token is
compared. Progress counts a run in the crowd and one alone for each request. Exits with 1 if a bit differs.

examples:
  isthmus check determinism                                    small networks of each kind
  isthmus check determinism --requests 1000 --all              all kinds of numbers, too
  isthmus check determinism --model models/llama --quantize int8"""


@dataclass(frozen=True)
class Determinism:
    """Compares each request in a crowd with the same one alone."""

    model: Path | None = None
    """A model folder; without it, small networks with random weights are checked: dense, with windows, with experts and
    with latent attention"""
    requests: int = 200
    """How many requests for each network"""
    seed: int = 0
    """Decides what is asked"""
    dtype: Dtype | Literal["auto"] = "auto"
    """What the network computes in; auto is bfloat16 except on CPU"""
    quantize: Literal["none", "int8", "int6", "int5", "int4"] = "none"
    """Makes matrices integers when they are loaded, as for isthmus serve"""
    cache_dtype: Literal["model", "float32", "bfloat16", "int8"] = "model"
    """The dtype of keys and values"""
    kernels: str = AUTO
    """Kernels by name, `auto`, or `reference`, which is XLA alone, as `isthmus serve` takes them"""
    context_length: int = 0
    """Most tokens of a request to --model, prompt included; 0 is 256, or what the model has if that is less"""
    all: bool = False
    """Without --model: float32, bfloat16, int8 and int4 weights and an int8 cache, for each network"""


DEFAULT_CONTEXT = 256
"""The most tokens of a request to --model, where nothing else is asked for"""
Subject = tuple[str, Callable[[], tuple[Executor, Learner | str]]]
"""A name, and what makes the engine, and either what training says of a text or why that differs"""

ALL = (
    Numbers("float32"),
    Numbers("bfloat16"),
    Numbers("float32", "int8"),
    Numbers("bfloat16", "int4"),
    Numbers("float32", cache_dtype="int8"),
    Numbers("bfloat16", "int8", "int8"),
)
"""The kinds of numbers that --all checks."""


def subjects(config: Determinism) -> Iterator[Subject]:
    """What is to be checked, by name."""
    if config.model is not None:
        yield config.model.name, lambda: _of_folder(config, config.model)  # type: ignore[arg-type]
        return
    numbers = Numbers("float32" if config.dtype == "auto" else config.dtype, config.quantize, config.cache_dtype)
    for each in ALL if config.all else (numbers,):
        for name, network in NETWORKS.items():
            engine = crowd_config(network.context_length)
            yield (
                f"{name}, {each}",
                lambda network=network, each=each, engine=engine: _small(  # type: ignore[misc]
                    network, each, engine, config.kernels
                ),
            )


def _small(
    network: ModelConfig, numbers: Numbers, engine: EngineConfig, kernels: str
) -> tuple[Executor, Learner | str]:
    executor = small_executor(network, numbers, engine, kernels)
    reason = why_not_trained(executor.served, numbers.quantize != "none")
    return executor, reason or learner(executor.served, small_params(network))


def _of_folder(config: Determinism, path: Path) -> tuple[Executor, Learner | str]:
    model = open_model(path, config.dtype, quantize=config.quantize)
    engine = crowd_config(config.context_length or min(DEFAULT_CONTEXT, model.config.context_length))
    engine = replace(engine, cache_dtype=config.cache_dtype)
    return build_executor(model, engine, MeshShape(), kernels=config.kernels), "only small networks are trained here"


FORMS = (
    JsonSchema({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 9}}}),
    Regex("[a-z]{2,20}( [0-9]+)*"),
    Choices(("yes", "no", "perhaps tomorrow")),
)
"""What texts of --model must be, in some requests"""


def _grammars(path: Path) -> list[Constraint]:
    folder = open_model(path)
    return [Grammars(folder.tokenizer, folder.config.vocab_size).constraint(form) for form in FORMS]


def run(config: Determinism, console: Console) -> int:
    """Prints a verdict for each subject. Returns 1 if any request got other bits in the crowd than alone."""
    if config.requests < 1:
        raise ConfigError(f"requests={config.requests} must be at least 1")
    if config.all and config.model is not None:
        raise ConfigError("all: --all is of the small networks; --model takes --dtype, --quantize and --cache-dtype")
    if config.context_length and config.model is None:
        raise ConfigError("context_length: --context-length needs --model")
    failed = 0
    constraints = _grammars(config.model) if config.model is not None else ()
    for name, build in subjects(config):
        with stages(Display(stderr=True, soft_wrap=True)) as shown:
            shown.say(f"{name}: loading and compiling")
            executor, learned = build()
            vocab, context = executor.served.vocab, executor.engine.context_length
            width = executor.model.vocab_size
            adapters = list(executor.adapters.values())
            arrivals = random_arrivals(
                vocab, context, config.requests, config.seed, width, constraints, adapters,
                guests(executor.model, config.seed),
            )  # fmt: skip
            stage = shown.begin(f"{name}: requests in the crowd, then each alone", 2 * config.requests, "runs")
            verdict = check(executor, arrivals, stage.advance, None if isinstance(learned, str) else learned)
        kernels, setting = executor.served.execution.kernels, executor.served.setting(executor.mesh)
        executor.free()
        failed += not verdict.holds
        _print(console, name, verdict, learned if isinstance(learned, str) else "")
        if REFERENCE in (said := announcement(kernels, setting)):
            console.print(f"  {said}: with the reference, XLA sums in another order in each program", highlight=False)
    return 1 if failed else 0


def _print(console: Console, name: str, verdict: Verdict, untrained: str) -> None:
    equal = verdict.requests - len(verdict.differences)
    around = (
        f"{verdict.tokens:,} tokens; {verdict.preemptions} preemptions, {verdict.cached_tokens:,} cached tokens, "
        f"{verdict.accepted:,} guessed, {verdict.recalled:,} of them by earlier texts, {verdict.cancelled} cancelled; "
        f"{verdict.resumed} resumed, {verdict.scored} scored, "
        + (f"none trained: {untrained}" if untrained else f"{verdict.trained} trained")
    )
    console.print(f"{name}: {equal:,} of {verdict.requests:,} requests with the same bits ({around})", highlight=False)
    if verdict.differences:
        console.print(f"  the first that differs: {verdict.differences[0]}", style="red", highlight=False, markup=False)


def main(argv: Sequence[str]) -> int:
    """Returns the process's exit status."""
    words = list(argv)
    if words and words[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0)  # as every command does
    if words[:1] != [CHECK]:
        if words:
            print(f"isthmus check: there is no check {words[0]!r}{near(words[0], [CHECK])}\n", file=sys.stderr)
        print(USAGE, file=sys.stderr)
        return 2
    config = tyro.cli(Determinism, args=words[1:], prog="isthmus check determinism", description=HELP)
    enable_compilation_cache()
    try:
        return run(config, Console(soft_wrap=True))
    except ConfigError as error:
        print(f"isthmus check: {error}", file=sys.stderr)
        return 2
