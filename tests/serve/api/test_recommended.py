"""What a request leaves open is as the model's makers recommend; what it says is as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.client import generate_request
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.folder import GenerationDefaults
from isthmus.serve.api.validation import build_request
from isthmus.serve.engine.request import InvalidRequest
from tests.model.weights.huggingface.folders import write_tokenizer

RECOMMENDED = GenerationDefaults(temperature=0.6, top_p=0.95, top_k=20)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return Tokenizer.load(tmp_path / "tokenizer.json")


def test_recommended_sampling_fills_what_is_absent(tokenizer: Tokenizer) -> None:
    """A reasoning model at temperature 1 without top_k talks nonsense, and nobody knows why."""
    plain = build_request(generate_request("a"), [1], tokenizer, 64, RECOMMENDED).sampling
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p) == (0.6, 0.95, 20, 0.0)
    asked = build_request(generate_request("a", temperature=0.0, top_k=0), [1], tokenizer, 64, RECOMMENDED).sampling
    assert (asked.temperature, asked.top_p, asked.top_k) == (0.0, 0.95, 0)
    nothing = build_request(generate_request("a"), [1], tokenizer, 64, GenerationDefaults()).sampling
    assert (nothing.temperature, nothing.top_p, nothing.top_k) == (1.0, 1.0, 0)


def test_a_token_without_an_embedding_is_refused(tokenizer: Tokenizer) -> None:
    """Gemma 3's tokenizer spells one more token than the model has: it would read another token's row."""
    tokenizer.vocab_size = 50
    with pytest.raises(InvalidRequest, match="spells the token 50"):
        build_request(generate_request("a"), [3, 50], tokenizer, 64, GenerationDefaults())
