"""Predictions of known tokens are what an engine says, and what the training side's forward pass computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.checks.crowd import Arrival, play
from isthmus.model.parameter import Dtype
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.quantization import quantize_params
from isthmus.serve.engine.build import build_executor, open_model
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.predictions import predictions
from isthmus.serve.engine.sampling import Sampling
from tests.serve.api.harness import save_model, train_tokenizer, varied_params
from tests.support import forward, narrowest_dtype


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("scoring") / "mine", train_tokenizer(), varied_params())


@pytest.mark.parametrize(
    "quantize, dtype, cache_dtype", [("none", "float32", "model"), ("int5", narrowest_dtype(), "int8")]
)
def test_the_likeliest_token_is_what_an_engine_says(
    quantize: str, dtype: Dtype, cache_dtype: Any, folder: Path
) -> None:
    """Otherwise the gate judges a model that nobody serves. The engine's prompts come in two steps, its tokens one by
    one; the window here is one step."""
    model = open_model(folder, dtype, quantize=quantize)
    config = EngineConfig(
        1, context_length=96, prefill_tokens=32, draft_rows=0, steps_per_launch=1, cache_dtype=cache_dtype
    )
    arrival = Arrival(Request("one", [*range(9, 49)], Sampling(temperature=0), 50))
    play(build_executor(model, config, MeshShape()), [arrival])
    window = np.array([arrival.tokens], np.int32)
    (logits,) = predictions(model, cache_dtype, window, len(arrival.request.prompt) - 1)
    assert logits.dtype == np.float32 and logits.shape == (50, model.config.vocab_size)
    assert logits.argmax(axis=1).tolist() == arrival.completion


@pytest.mark.parametrize("rules", [(), (".*mlp.*=int4", ".*=int8")])
def test_they_are_those_of_the_dequantized_matrices(rules: tuple[str, ...], folder: Path) -> None:
    """Without the kernels, which round activations too; windows that fill no whole block, and any number of them."""
    config = open_folder(folder).config
    windows = np.random.default_rng(0).integers(1, config.vocab_size, (3, 70), dtype=np.int32)
    model = dataclasses.replace(open_model(folder, "float32"), quantize=rules)
    got = np.stack(list(predictions(model, "model", windows, 35, kernels="reference")))
    params = open_folder(folder).load_params(build_mesh(MeshShape()))
    if rules:
        quantize_params(config, params, rules)
    want = forward(config, params, windows)[:, 35:-1]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
