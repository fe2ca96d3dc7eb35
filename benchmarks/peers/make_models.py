"""Writes the models that every peer runs: `make_models.py FOLDER [NAME ...]` makes FOLDER/125m and FOLDER/1b.

Hugging Face folders of the Llama architecture, as transformers saves them: config.json, bfloat16 safetensors and a
tokenizer. Weights are normal with standard deviation 0.02 and norms are one: the text means nothing, but an engine's
speed does not depend on the weights. Needs numpy and tokenizers. The same seed writes the same bytes.
"""

import argparse
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 32000
HEAD_DIM = 64
CONTEXT = 4096
STANDARD_DEVIATION = 0.02
SPECIAL = ("<s>", "</s>")
"""Ids 0 and 1: the beginning and the end of a text"""


@dataclass(frozen=True)
class Sizes:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    tied: bool
    """The embedding is the output's matrix too"""


MODELS = {
    "125m": Sizes(hidden=768, layers=12, heads=12, kv_heads=4, ffn=2048, tied=False),
    "1b": Sizes(hidden=2048, layers=16, heads=32, kv_heads=8, ffn=8192, tied=True),
}


def config(sizes: Sizes) -> dict:
    """config.json, as transformers writes it for a LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": STANDARD_DEVIATION,
        "intermediate_size": sizes.ffn,
        "max_position_embeddings": CONTEXT,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": sizes.tied,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter's name and shape; linear layers are (outputs, inputs)."""
    hidden, kv = sizes.hidden, sizes.kv_heads * HEAD_DIM
    yield "model.embed_tokens.weight", (VOCAB_SIZE, hidden)
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (sizes.heads * HEAD_DIM, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, sizes.heads * HEAD_DIM)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (sizes.ffn, hidden)
        yield prefix + "mlp.up_proj.weight", (sizes.ffn, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, sizes.ffn)
    yield "model.norm.weight", (hidden,)
    if not sizes.tied:
        yield "lm_head.weight", (VOCAB_SIZE, hidden)


def bfloat16(values: np.ndarray) -> bytes:
    """The bytes of float32 values as bfloat16, rounded to nearest, ties to even. Finite values only."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def values(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """A parameter's float32 values: ones for a norm's vector, else normal."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return random.standard_normal(shape, np.float32) * np.float32(STANDARD_DEVIATION)


def write_tensors(path: Path, sizes: Sizes, seed: int) -> None:
    """Writes the parameters as one safetensors file, one at a time: none but the largest is ever in memory.

    By hand, because safetensors itself takes bfloat16 only of torch or ml_dtypes, which this script does without.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes(sizes):
        end = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for _, shape in shapes(sizes):
            file.write(bfloat16(values(shape, random)))


def tokenizer() -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE: the 256 bytes, then pairs of them in order until it is full."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet][: VOCAB_SIZE - len(SPECIAL) - len(alphabet)]
    entries = [*SPECIAL, *alphabet, *(a + b for a, b in pairs)]
    result = Tokenizer(models.BPE(vocab={text: token for token, text in enumerate(entries)}, merges=pairs))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    assert result.get_vocab_size() == VOCAB_SIZE
    return result


def write_model(folder: Path, sizes: Sizes, seed: int = 0) -> None:
    """Writes the folder; overwrites files of the same names."""
    folder.mkdir(parents=True, exist_ok=True)
    begin, end = SPECIAL
    documents = {
        "config.json": config(sizes),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1, "transformers_version": "5.23.0"},
        "tokenizer_config.json": {
            "backend": "tokenizers",
            "bos_token": begin,
            "eos_token": end,
            "model_max_length": CONTEXT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    tokenizer().save(str(folder / "tokenizer.json"))
    write_tensors(folder / "model.safetensors", sizes, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(MODELS)}; all if none")
    arguments = parser.parse_args()
    for name in arguments.names or MODELS:
        if name not in MODELS:
            parser.error(f"{name!r} is none of {', '.join(MODELS)}")
        write_model(arguments.folder / name, MODELS[name])
        print(arguments.folder / name)


if __name__ == "__main__":
    main()
