"""From a folder to an engine: what the defaults become on a machine that is smaller than the model's context."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from isthmus.checks.crowd import Arrival, play
from isthmus.commands.main import main
from isthmus.errors import ConfigError
from isthmus.model.config import LatentConfig, ModelConfig
from isthmus.model.execution import DEFAULT_EXECUTION, Execution
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.serve.engine import build
from isthmus.serve.engine.build import build_executor, fit_memory, open_model
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.sampling import Sampling
from tests.model.weights.huggingface.folders import write_folder

LONG = ModelConfig(
    vocab_size=1000, dim=256, layers=8, heads=8, kv_heads=4, head_dim=32, mlp_dim=512, context_length=131072
)
WEIGHTS = LONG.parameters * 4
TOKEN = EngineConfig().kv_bytes_per_token(LONG, "float32")


@dataclass(frozen=True)
class Folder:
    """What counts of a model's folder for the memory that serving it takes."""

    config: ModelConfig
    execution: Execution = DEFAULT_EXECUTION
    quantize: tuple[str, ...] = ()


def fit(free: int | None, engine: EngineConfig | None = None, mesh: MeshShape | None = None) -> EngineConfig:
    return fit_memory(engine or EngineConfig(), Folder(LONG), mesh or MeshShape(), free)


def test_a_machine_with_room_gets_the_default() -> None:
    """The limit is for those who need it."""
    assert fit(WEIGHTS + 2 * 40 * 131072 * TOKEN) == EngineConfig().resolve(LONG)


def test_a_device_that_does_not_tell_its_memory_gets_the_default() -> None:
    """Not every platform counts it; that is no reason to refuse to serve there."""
    assert fit(None) == EngineConfig().resolve(LONG)


def test_fewer_pages_come_before_a_shorter_context() -> None:
    """Fewer requests at once is slower; a context that is cut is another service."""
    got = fit(WEIGHTS + 2 * 3 * 131072 * TOKEN)
    assert got.context_length == 131072 and got.pages * got.page_size == 3 * 131072


def test_a_context_that_does_not_fit_is_shortened_unless_it_was_asked_for() -> None:
    """A model with a context of 128k tokens must start on a laptop; a context somebody relies on must not shrink."""
    free = WEIGHTS + 2 * 10_000 * TOKEN
    got = fit(free)
    assert 9_000 < got.context_length < 10_000 and got.pages * got.page_size <= 10_000
    assert fit(free, EngineConfig(context_length=4096)).context_length == 4096
    with pytest.raises(ConfigError, match=r"context_length=65536: .* room for \d+ tokens"):
        fit(free, EngineConfig(context_length=65536))
    with pytest.raises(ConfigError, match="GB are free"):
        fit(WEIGHTS // 2)


def test_what_programs_need_is_not_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server in a container of 900 MB filled what its weights left with cache, and was killed amid a step."""
    model = open_model(write_folder(tmp_path / "model", "llama3"))
    monkeypatch.setattr(build, "free_memory", lambda device: 250 << 20)
    with pytest.raises(ConfigError, match=r"memory for \d+ tokens: 0\.00 GB are free, .* room for 0 tokens"):
        build_executor(model, EngineConfig(), MeshShape())


def test_pages_that_were_asked_for_are_not_touched() -> None:
    """Whoever counts pages knows the machine."""
    assert fit(0, EngineConfig(pages=9000)).pages == 9000


def test_devices_share_the_cache_unless_it_is_latent() -> None:
    """Key heads are split over devices; one latent vector a token is on each of them."""
    free = WEIGHTS + 2 * 2 * 131072 * TOKEN
    split = fit(free, mesh=MeshShape(tp=4))
    assert split.pages > 4 * fit(free).pages
    latent = LatentConfig(rank=24, rope_dim=8, nope_dim=16, value_dim=16)
    config = dataclasses.replace(LONG, kv_heads=1, head_dim=32, latent=latent)
    free = config.parameters * 4 + 2 * 131072 * EngineConfig().kv_bytes_per_token(config, "float32")
    alone, several = (fit_memory(EngineConfig(), Folder(config), MeshShape(tp=tp), free).pages for tp in (1, 4))
    assert several < 1.1 * alone


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    source = write_folder(folder / "source", "llama3", shards=2)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    flags = ["--quantize", "int8", "--text", str(folder / "text.txt"), "--force"]
    assert main(["convert", str(source), str(folder / "small"), *flags]) == 0
    return folder / "small"


@pytest.mark.parametrize(
    "kind, kernels, tp",
    [
        ("none", "auto", 1),
        ("int4", "auto", 1),
        pytest.param("int8", "reference", 2, marks=pytest.mark.slow),
        ("converted", "auto", 1),
        pytest.param("converted", "reference", 2, marks=pytest.mark.slow),
    ],
)
def test_programs_are_compiled_for_what_will_be_loaded(
    kind: str, kernels: str, tp: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """They are compiled while the parameters are read, made integers and packed one by one: made for anything else, a
    start would fail at its end. It generates what an engine does whose parameters were there first."""
    if kind == "converted":
        path = request.getfixturevalue("converted")
    else:
        path = write_folder(tmp_path / "source", "llama3", shards=2)
    model = open_model(path, "float32", quantize=kind if kind.startswith("int") else "none")
    engine = EngineConfig(max_sequences=1, context_length=64, prefill_tokens=32, draft_rows=0, steps_per_launch=1)
    ticks: list[str] = []
    executor = build_executor(model, engine, MeshShape(tp=tp), ticks.append, kernels=kernels)
    assert sum("programs" in text for text in ticks) == len(executor.engine.buckets)
    got = completion(executor)
    mesh = build_mesh(MeshShape(tp=tp))
    later = Executor(executor.served, model.load_params(mesh, model.execution.dtype), mesh)
    later.warm_up()
    assert got == completion(later)


def completion(executor: Executor) -> list[int]:
    arrival = Arrival(Request("one", [5, 6, 7], Sampling(temperature=0), 20))
    play(executor, [arrival])
    assert executor.recompilations == 0
    return arrival.completion


def test_a_folder_that_can_not_be_loaded_ends_the_start(tmp_path: Path) -> None:
    """With the reason, though programs are being compiled meanwhile."""
    path = write_folder(tmp_path / "source", "llama3", shards=2)
    model = open_model(path, "float32")
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        build_executor(model, EngineConfig(max_sequences=2, context_length=64, prefill_tokens=32), MeshShape())


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 1e9])
def test_a_time_that_no_launch_may_take_is_refused(seconds: float) -> None:
    """Nothing would ever be launched together, or a stream's tokens would come when it is over."""
    with pytest.raises(ConfigError, match=r"^engine\.launch_time=.* must be more than 0, to 3600 seconds$"):
        EngineConfig(launch_time=seconds).resolve(ModelConfig())


@pytest.mark.parametrize("field", ["max_sequences", "page_size", "prefill_tokens", "block_size", "max_waiting"])
@pytest.mark.parametrize("size", [0, -1, 10**9])
def test_sizes_that_no_engine_has_are_refused(field: str, size: int) -> None:
    """A billion sequences would compile for hours before the memory ran out."""
    with pytest.raises(ConfigError, match=rf"^engine\.{field}={size} must be 1 to \d+$"):
        EngineConfig(**{field: size}).resolve(ModelConfig())  # type: ignore[arg-type]
