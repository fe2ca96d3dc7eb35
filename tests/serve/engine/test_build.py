"""From a folder to an engine: what the defaults become on a machine that is smaller than the model's context."""

from __future__ import annotations

import dataclasses

import pytest

from model.config import ConfigError, LatentConfig, ModelConfig
from model.sharding import MeshShape
from serve.engine.build import fit_memory
from serve.engine.config import EngineConfig

LONG = ModelConfig(
    vocab_size=1000, dim=256, layers=8, heads=8, kv_heads=4, head_dim=32, mlp_dim=512, context_length=131072
)
WEIGHTS = LONG.parameters * 4
TOKEN = LONG.kv_bytes_per_token()


def fit(free: int | None, engine: EngineConfig | None = None, mesh: MeshShape | None = None) -> EngineConfig:
    return fit_memory(engine or EngineConfig(), LONG, mesh or MeshShape(), free)


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
    free = config.parameters * 4 + 2 * 131072 * config.kv_bytes_per_token()
    alone, several = (fit_memory(EngineConfig(), config, MeshShape(tp=tp), free).pages for tp in (1, 4))
    assert several < 1.1 * alone
