"""Writes a folder that computes the same with other weights: `rescale.py MODEL FOLDER`.

A model that was made from a GGUF file has weights that once were integers, and whatever quantizes by the same groups
finds them again. Here every channel between two matrices, or between a norm and what it feeds, is multiplied by a
number near one on one side and divided by it on the other: in exact arithmetic nothing changes, but no group of weights
lies on a grid any more. Takes Llama and Gemma 3 in one file of safetensors, writes float32, leaves the embedding alone.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

SPREAD = 0.15
"""The factors are uniformly distributed between 1 - SPREAD and 1 + SPREAD"""

NORMS = {
    "llama": {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")},
    "gemma3_text": {
        "input_layernorm": ("q_proj", "k_proj", "v_proj"),
        "pre_feedforward_layernorm": ("gate_proj", "up_proj"),
    },
}
"""By model_type: each norm of a layer, and the matrices that multiply what comes out of it"""

OFFSET = {"llama": 0.0, "gemma3_text": 1.0}
"""Added to a norm's weight before it multiplies"""


def rescale(config: dict, tensors: dict[str, np.ndarray], random: np.random.Generator) -> None:
    """Changes the float32 tensors of a model in place."""
    kind, groups = config["model_type"], config["num_attention_heads"] // config["num_key_value_heads"]
    factors = lambda size: random.uniform(1 - SPREAD, 1 + SPREAD, size).astype(np.float32)  # noqa: E731
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}."
        parts = {name.split(".")[-2]: name for name in tensors if name.startswith(place)}
        for norm, fed in NORMS[kind].items():
            by = factors(config["hidden_size"])
            tensors[parts[norm]] = (tensors[parts[norm]] + OFFSET[kind]) * by - OFFSET[kind]
            for name in fed:
                tensors[parts[name]] /= by
        by = factors(len(tensors[parts["up_proj"]]))
        tensors[parts["up_proj"]] *= by[:, None]
        tensors[parts["down_proj"]] /= by
        by = factors(len(tensors[parts["v_proj"]]))
        tensors[parts["v_proj"]] *= by[:, None]
        heads = by.reshape(config["num_key_value_heads"], -1).repeat(groups, axis=0)
        tensors[parts["o_proj"]] /= heads.reshape(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model's folder, in Hugging Face's layout")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to make")
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    if config["model_type"] not in NORMS:
        parser.error(f"model_type {config['model_type']!r} is none of {', '.join(NORMS)}")
    with safe_open(arguments.model / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
    rescale(config, tensors, np.random.default_rng(0))
    shutil.copytree(arguments.model, arguments.folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, arguments.folder / "model.safetensors", {"format": "pt"})
    (arguments.folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
