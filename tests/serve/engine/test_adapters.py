"""Adapters side by side in one engine: each request gets its own, as if it were there alone, and nobody else's."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from isthmus.checks.crowd import Arrival, play
from isthmus.errors import ConfigError, ModelNotFound
from isthmus.model.config import LatentConfig, LoraConfig, MixtureConfig, ModelConfig
from isthmus.model.ops.operation import AUTO
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.transformer import Params
from isthmus.model.weights.checkpoint import Checkpoints
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.huggingface.adapters import save_adapter
from isthmus.model.weights.lora import split
from isthmus.serve.engine.build import build_executor, open_model
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import End, Request
from isthmus.serve.engine.prefix import root_key
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.sequence import Sequence as Running
from tests.support import TINY, next_tokens, on_host, random_params

ENGINE = EngineConfig(max_sequences=4, page_size=8, block_size=16, prefill_tokens=32, draft_rows=0, steps_per_launch=1)
FEW = dataclasses.replace(ENGINE, max_sequences=2)
LORAS = {
    "wide": LoraConfig(5, 20.0, r"attention/(query|key|value|out)|mlp/(gate|up|down)"),
    "narrow": LoraConfig(2, 1.0, r"attention/(query|out)|mlp/down"),
}
"""Of different ranks, scales and targets. A scale is a power of two, which is exact wherever it is multiplied: what is
rounded otherwise may be another integer, where a base's products are of integers"""
DEEPSEEK = dataclasses.replace(
    TINY,
    layers=3,
    kv_heads=1,
    head_dim=16,
    latent=LatentConfig(rank=8, query_rank=12, rope_dim=8, nope_dim=6, value_dim=10),
    mixture=MixtureConfig(experts=4, dim=8, shared_dim=16, dense_layers=(0,)),
)
TARGETS = {
    "wide": r"attention/(query_down|query|latent|out)|mlp/(shared/)?(gate|up|down)",
    "narrow": r"attention/query|mlp/shared/down",
}
NETWORKS = {
    "dense": (TINY, LORAS),
    "with biases": (dataclasses.replace(TINY, attention_bias=True, mlp_bias=True, qk_norm="head"), LORAS),
    "latent attention, shared expert": (
        DEEPSEEK,
        {name: dataclasses.replace(lora, targets=TARGETS[name]) for name, lora in LORAS.items()},
    ),
}


@dataclasses.dataclass
class Made:
    """A base model's folder with its adapters' folders beside it, and what is in them."""

    base: Path
    folders: dict[str, Path]
    configs: dict[str, ModelConfig]
    params: dict[str, Params]

    def executor(
        self, engine: EngineConfig = ENGINE, mesh: MeshShape | None = None, kernels: str = AUTO, **options: Any
    ) -> Executor:
        """Of the base model with all of the adapters."""
        model = open_model(self.base, "float32", adapters=self.folders, **options)
        return build_executor(model, engine, mesh or MeshShape(), kernels=kernels)


def make(folder: Path, network: str = "dense") -> Made:
    tokenizer, mesh = Tokenizer.train(["a tiny tokenizer"], 258), build_mesh(MeshShape())
    config, loras = NETWORKS[network]
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    base = folder / "base"
    base.mkdir()
    config.save(base / "config.json")
    tokenizer.save(base / "tokenizer.json")
    checkpoints = Checkpoints(base)
    checkpoints.save(1, random_params(config, mesh, stacked=True), {"count": np.int32(1)}, {})
    checkpoints.close()
    plain = open_folder(base).load_params(mesh)
    made = Made(base, {}, {"": config}, {"": plain})
    for seed, (name, lora) in enumerate(loras.items(), 1):
        made.configs[name] = adapted = dataclasses.replace(config, lora=lora)
        _, adapter = split(adapted, random_params(adapted, mesh, seed))
        made.params[name] = {**plain, **adapter}
        made.folders[name] = folder / name
        save_adapter(folder / name, open_folder(base), adapted, made.params[name])
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def executor(made: Made) -> Executor:
    return made.executor()


def asked(executor: Executor, name: str, prompt: Sequence[int], tokens: int = 16, **options: Any) -> Request:
    adapter = executor.adapters[name] if name else None
    sampling = Sampling(temperature=0, logprobs=2)
    return Request(f"{name or 'base'} {len(prompt)}", prompt, sampling, tokens, adapter=adapter, **options)


def ends(executor: Executor, requests: Sequence[Request]) -> list[End]:
    arrivals = [Arrival(request, step=index // 2) for index, request in enumerate(requests)]
    play(executor, arrivals)
    return [arrival.end for arrival in arrivals if arrival.end is not None]


def some_requests(executor: Executor, names: Sequence[str]) -> list[Request]:
    """One for each of the names, with a prompt of its own, in an order that mixes them in every step."""
    rng = np.random.default_rng(7)
    return [asked(executor, name, rng.integers(3, 90, 5 + 7 * index).tolist()) for index, name in enumerate(names)]


CROWD = ["wide", "", "narrow", "wide", "narrow", ""]


@pytest.mark.parametrize(
    "network", [pytest.param(name, marks=[] if name == "dense" else [pytest.mark.slow]) for name in NETWORKS]
)
def test_each_request_is_computed_with_its_own_adapter(network: str, tmp_path: Path) -> None:
    """Against the training side's forward pass with that adapter's numbers alone."""
    made = make(tmp_path, network)
    executor = made.executor()
    requests = some_requests(executor, CROWD)
    vocab = executor.served.vocab
    for name, request, end in zip(CROWD, requests, ends(executor, requests), strict=True):
        sequence, first = [*request.prompt, *end.tokens], len(request.prompt) - 1
        part = slice(first, first + len(end.tokens))
        mine, plain = (
            next_tokens(made.configs[each], on_host(made.params[each]), [sequence], vocab)[0] for each in (name, "")
        )
        assert list(end.tokens) == mine[part].tolist(), request.id
        assert not name or list(end.tokens) != plain[part].tolist(), "the adapter decides nothing"


def test_a_crowd_changes_no_bit(executor: Executor) -> None:
    requests = some_requests(executor, CROWD)
    crowd = ends(executor, requests)
    for request, end in zip(requests, crowd, strict=True):
        (alone,) = ends(executor, [request])
        assert (end.tokens, end.logprobs) == (alone.tokens, alone.logprobs), request.id
    assert executor.recompilations == 0


def test_an_adapter_is_what_its_folder_is_alone(made: Made, executor: Executor) -> None:
    """Who moves from a server for each adapter to one for all keeps the answers, and requests without keep theirs."""
    requests = some_requests(executor, CROWD)
    together = ends(executor, requests)
    for name, folder in {"": made.base, **made.folders}.items():
        alone = build_executor(open_model(folder, "float32"), ENGINE, MeshShape())
        mine = [n for n, each in enumerate(CROWD) if each == name]
        found = ends(alone, [dataclasses.replace(requests[n], adapter=None) for n in mine])
        for n, end in zip(mine, found, strict=True):
            assert end.tokens == together[n].tokens
            own, others = ([each.token for each in one.logprobs] for one in (end, together[n]))
            np.testing.assert_allclose(own, others, rtol=0, atol=1e-5)


def test_nobody_gets_pages_of_another_adapter(executor: Executor) -> None:
    """Keys and values of one adapter are noise to another: what was asked before must not change what is said."""
    prompt = list(range(3, 60))
    fresh = [ends(executor, [asked(executor, name, prompt, 4)])[0] for name in ("", "wide", "narrow")]
    names = ["", "wide", "narrow", "wide"]
    requests = [dataclasses.replace(asked(executor, name, prompt, 4), id=f"{n}") for n, name in enumerate(names)]
    arrivals = [Arrival(request, step=100 * n) for n, request in enumerate(requests)]
    play(executor, arrivals)
    again = [arrival.end for arrival in arrivals]
    assert [end.progress.cached_tokens for end in again if end] == [0, 0, 0, 48]
    for end, name in zip(again, names, strict=True):
        want = fresh[["", "wide", "narrow"].index(name)]
        assert end is not None and (end.tokens, end.logprobs) == (want.tokens, want.logprobs)


def test_roots_differ_by_the_adapter(executor: Executor) -> None:
    """Whatever a client puts into its salt: another adapter's key, say."""
    keys = [executor.adapters[name].key for name in LORAS]
    salts = [b"", *keys, *(b"\0" + key for key in keys), *(b"\1" + key for key in keys)]
    roots = {root_key(Running(asked(executor, name, [1], cache_salt=salt))) for name in ("", *LORAS) for salt in salts}
    assert len(roots) == 3 * len(salts)


def told(executor: Executor, name: str) -> list[float]:
    """The log-probability of each token of a prompt."""
    (end,) = ends(executor, [asked(executor, name, list(range(3, 40)), 1, scored_from=1)])
    return [each.token for each in end.prompt_logprobs]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_base_may_be_integers(quantize: str, made: Made) -> None:
    """Most who serve many adapters quantize the base. The adapters stay what they are."""
    executor = made.executor(FEW, quantize=quantize)
    for name, folder in made.folders.items():
        alone = build_executor(open_model(folder, "float32", quantize=quantize), FEW, MeshShape())
        alone.adapters = executor.adapters  # its network has the adapter in every token
        np.testing.assert_allclose(told(executor, name), told(alone, name), rtol=0, atol=2e-5)
        assert np.abs(np.subtract(told(executor, name), told(executor, ""))).max() > 0.1


@pytest.mark.slow
def test_the_base_may_be_split_over_devices(made: Made) -> None:
    """An adapter's factors are split as the matrices are that they adapt. XLA computes both: over devices it does."""
    one = dataclasses.replace(ENGINE, max_sequences=1, prefill_tokens=16)  # few programs, which take XLA long
    whole, split_up = made.executor(one, kernels="reference"), made.executor(one, MeshShape(tp=2))
    for name in ("", *LORAS):
        np.testing.assert_allclose(told(split_up, name), told(whole, name), rtol=0, atol=2e-5)


def test_places_for_more_are_the_same(made: Made, executor: Executor) -> None:
    """A server with room for others says what one without says."""
    roomy = made.executor(dataclasses.replace(ENGINE, max_adapters=4, adapter_rank=8))
    requests = some_requests(executor, CROWD)
    for few, more in zip(ends(executor, requests), ends(roomy, some_requests(roomy, CROWD)), strict=True):
        assert few.tokens == more.tokens
    assert roomy.model.lora.adapters == 4 and roomy.model.lora.rank == 8


def test_an_adapter_that_is_not_here_is_refused(executor: Executor) -> None:
    """One that was taken from another engine: its place may be somebody else's here."""
    engine = Engine(executor, lambda events: None)
    request = asked(executor, "wide", [1, 2])
    assert request.adapter is not None
    engine.validate(request)
    for other in ({"name": "other"}, {"key": bytes(32)}, {"place": 2}):
        with pytest.raises(ModelNotFound, match="is not here"):
            engine.validate(dataclasses.replace(request, adapter=dataclasses.replace(request.adapter, **other)))


def test_what_is_left_out_is_said(made: Made, tmp_path: Path) -> None:
    """An adapter that was trained with a template of its own answers worse with another, and nobody would know why."""
    folder = shutil.copytree(made.folders["wide"], tmp_path / "wide")
    (folder / "tokenizer.json").write_bytes((made.base / "tokenizer.json").read_bytes())
    assert open_model(made.base, "float32", adapters={"wide": folder}).remarks == ()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text("{}")
    (remark,) = open_model(made.base, "float32", adapters={"wide": folder}).remarks
    assert remark == (
        f"{folder} has another tokenizer, another chat template: not used, because adapters share those of the model"
    )


def test_what_does_not_fit_is_named(made: Made, tmp_path: Path) -> None:
    """Before minutes of compiling, and so that one knows which of many to look at."""
    wide, narrow = made.folders["wide"], made.folders["narrow"]

    def refused(match: str, *, base: Path = made.base, sizes: Any = None, **adapters: Path) -> None:
        engine = dataclasses.replace(ENGINE, **(sizes or {}))
        with pytest.raises(ConfigError, match=match):
            build_executor(open_model(base, "float32", adapters=adapters), engine, MeshShape())

    refused(r"adapters: one=.* can't be had beside base: .* has no adapter_config\.json", one=made.base)
    deeper = shutil.copytree(wide, tmp_path / "deeper")
    tensors = load_file(deeper / "adapter_model.safetensors")
    moved = {re.sub(r"\.layers\.0\.", ".layers.70.", name): tensor for name, tensor in tensors.items()}
    save_file(moved, deeper / "adapter_model.safetensors")
    refused(r"is of layer 70, and the model has layers 0 to \d+: it is an adapter of another model", deeper=deeper)
    low = {"max_adapters": 2, "adapter_rank": 4}
    refused("wide has rank 5; the most is engine.adapter_rank=4", sizes=low, wide=wide)
    refused("engine.max_adapters=1 has no place for 2", sizes={"max_adapters": 1}, one=wide, two=narrow)
    refused("engine.max_adapters=-1 must be", sizes={"max_adapters": -1})
    refused("is an adapter itself", base=wide, narrow=narrow)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).write_bytes((wide / name).read_bytes())
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    refused(r"adapters: other=.*use_dora", other=other)
    with pytest.raises(ConfigError, match="the model's own name"):
        open_model(made.base, "float32", adapters={"base": wide})
    with pytest.raises(ConfigError, match="printable"):
        open_model(made.base, "float32", adapters={"": wide})
