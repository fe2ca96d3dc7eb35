"""Run by the peers' Python: PEFT puts ADAPTER on the model in FOLDER and writes the logits of TOKENS to OUT.

    python tests/parity/check_adapter.py FOLDER ADAPTER TOKENS.npy OUT.npy [--merge]
    python tests/parity/check_adapter.py FOLDER ADAPTER [TOKENS.npy OUT.npy] --make RANK TARGETS [--alpha N] [--rslora]

`--make` first writes a random adapter to ADAPTER, on the modules named in TARGETS (with commas, or all-linear).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from check_export import load, write_logits


@torch.no_grad()
def make_adapter(model: Any, adapter: Path, lora: peft.LoraConfig) -> None:
    """Both factors random: PEFT's own B is zero, which would change nothing. Values depend on the names alone."""
    wrapped = peft.get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = np.random.default_rng([*name.encode()]).standard_normal(tuple(parameter.shape))
            scale = 0.25 if ".lora_B." in name else 1.0
            parameter.copy_(torch.from_numpy(scale * noise / parameter.shape[-1] ** 0.5))
    wrapped.save_pretrained(adapter)


def with_adapter(model: Any, adapter: Path) -> Any:
    """Asserts that the file's keys are the wrapped model's, and that each value arrived."""
    wrapped = peft.PeftModel.from_pretrained(model, adapter)
    held = peft.get_peft_model_state_dict(wrapped)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert held.keys() == stored.keys(), held.keys() ^ stored.keys()
    for name, array in stored.items():
        assert np.array_equal(held[name].float().numpy(), array.astype(np.float32)), name
    return wrapped.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("tokens", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--merge", action="store_true", help="merge_and_unload before computing")
    parser.add_argument("--make", nargs=2, metavar=("RANK", "TARGETS"))
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--rslora", action="store_true")
    args = parser.parse_args()
    if args.make:
        rank, targets = int(args.make[0]), args.make[1]
        lora = peft.LoraConfig(
            r=rank,
            lora_alpha=args.alpha,
            use_rslora=args.rslora,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            task_type="CAUSAL_LM",
        )
        make_adapter(load(args.folder), args.adapter, lora)
    if args.tokens is None:
        return
    if args.out is None:
        parser.error("TOKENS needs OUT")
    model = with_adapter(load(args.folder), args.adapter)
    write_logits(model.merge_and_unload() if args.merge else model, args.tokens, args.out)


if __name__ == "__main__":
    main()
