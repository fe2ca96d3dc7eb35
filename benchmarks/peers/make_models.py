"""Writes the models that every peer runs: `make_models.py FOLDER [NAME ...]` makes FOLDER/125m and FOLDER/1b.

They are Hugging Face folders of the Llama architecture, as transformers saves them: config.json, bfloat16 safetensors
and a tokenizer. Weights are normal with standard deviation 0.02 and norms are one: what the models write means nothing,
but an engine's speed does not depend on the weights. Needs torch and transformers. The same seed writes the same
weights.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 4096
STANDARD_DEVIATION = 0.02
SPECIAL = ("<s>", "</s>")
"""Ids 0 and 1: the beginning and the end of a text"""


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool) -> LlamaConfig:
    """tied: the embedding is the output's matrix too."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        intermediate_size=ffn,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=tied,
        dtype=torch.bfloat16,
    )


MODELS = {
    "125m": llama(hidden=768, layers=12, heads=12, kv_heads=4, ffn=2048, tied=False),
    "1b": llama(hidden=2048, layers=16, heads=32, kv_heads=8, ffn=8192, tied=True),
}


@torch.no_grad()
def model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A model whose matrices are drawn in float32, in the order of its parameters, and rounded. Norms are one."""
    made, random = LlamaForCausalLM(config).bfloat16(), np.random.default_rng(seed)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            drawn = random.standard_normal(tuple(parameter.shape), np.float32) * np.float32(STANDARD_DEVIATION)
            parameter.copy_(torch.from_numpy(drawn))
    return made


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: the 256 bytes, then pairs of them in order until it is full."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet][: vocab_size - len(SPECIAL) - len(alphabet)]
    entries = [*SPECIAL, *alphabet, *(a + b for a, b in pairs)]
    made = Tokenizer(models.BPE(vocab={text: token for token, text in enumerate(entries)}, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    assert made.get_vocab_size() == vocab_size
    begin, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin, eos_token=end, model_max_length=CONTEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to make the models' folders")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(MODELS)}; default: all")
    arguments = parser.parse_args()
    for name in arguments.names or MODELS:
        if name not in MODELS:
            parser.error(f"{name!r} is none of {', '.join(MODELS)}")
        config, folder = MODELS[name], arguments.folder / name
        model(config, seed=0).save_pretrained(folder)
        tokenizer(config.vocab_size).save_pretrained(folder)
        print(folder)


if __name__ == "__main__":
    main()
