"""Run by the peers' Python: what others make of folders whose matrices are kept as codes.

python tests/parity/check_coded.py FOLDER TOKENS.npy OUT.npy    logits, of transformers' own dequantization
python tests/parity/check_coded.py --compressed FOLDER OUT.npz  each matrix, by the library compressed-tensors
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file


def load(folder: Path) -> Any:
    """The model in float32, dequantized as it is loaded."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    method = said.pop("quant_method")
    make = {"fp8": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}[method]
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=make(**said, dequantize=True),
    ).eval()


@torch.no_grad()
def write_logits(folder: Path, tokens: Path, out: Path) -> None:
    ids = np.load(tokens).astype(np.int64)
    np.save(out, load(folder)(torch.from_numpy(ids), use_cache=False).logits.float().numpy())


def write_matrices(folder: Path, out: Path) -> None:
    """In float32: the scales are made so before the library multiplies by them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    compressor = BaseCompressor.get_value_from_registry(said["format"])
    scheme = QuantizationScheme(**said["config_groups"]["group_0"])
    stored = load_file(folder / "model.safetensors")
    found = {}
    for module in sorted({name.rpartition(".")[0] for name in stored if name.endswith("weight_scale")}):
        parts = {
            name.removeprefix(f"{module}."): array for name, array in stored.items() if name.startswith(f"{module}.")
        }
        parts["weight_scale"] = parts["weight_scale"].float()
        found[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"].float().numpy()
    np.savez(out, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compressed", action="store_true")
    parser.add_argument("paths", type=Path, nargs="+")
    args = parser.parse_args()
    (write_matrices if args.compressed else write_logits)(*args.paths)


if __name__ == "__main__":
    main()
