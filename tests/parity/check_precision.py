"""Run by the peers' Python: what torch's own bfloat16, autocast, is from its float32, to hold ours beside it.

    python tests/parity/check_precision.py FOLDER WINDOWS.npz OUT.npz [--lora]

WINDOWS has "train", int[seeds, steps, batch, seq + 1], and "heldout", int[batch, seq + 1]. OUT gets the held-out loss
after all steps, "float32" and "autocast", float64[seeds]; and, without --lora, the gradients of the first batch in
float64, "grad:NAME", and their errors with autocast, "error:NAME", each a tensor's Euclidean norm over the exact one's.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM

LR = {False: 1e-5, True: 2e-4}
"""By whether adapters are trained"""


def loss_of(model: Any, windows: np.ndarray, precision: AbstractContextManager) -> torch.Tensor:
    tokens = torch.from_numpy(windows.astype(np.int64))
    with precision:
        logits = model(tokens[:, :-1]).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def autocast(on: bool) -> AbstractContextManager:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)


def gradients(folder: str, windows: np.ndarray, dtype: torch.dtype, cast: bool) -> dict[str, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loss_of(model, windows, autocast(cast)).backward()
    return {name: parameter.grad.double().numpy() for name, parameter in model.named_parameters()}


def train(folder: str, batches: np.ndarray, heldout: np.ndarray, lora: bool, cast: bool) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora:
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR[lora], betas=(0.9, 0.95), eps=1e-8)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch, autocast(cast)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    with torch.no_grad():
        return float(loss_of(model, heldout, autocast(cast)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("windows")
    parser.add_argument("out")
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small matrices gain nothing from more
    windows = np.load(arguments.windows)
    out: dict[str, Any] = {
        name: [train(arguments.folder, seed, windows["heldout"], arguments.lora, cast) for seed in windows["train"]]
        for name, cast in (("float32", False), ("autocast", True))
    }
    if not arguments.lora:
        first = windows["train"][0, 0]
        exact = gradients(arguments.folder, first, torch.float64, False)
        cast = gradients(arguments.folder, first, torch.float32, True)
        for name, want in exact.items():
            out[f"grad:{name}"] = want
            out[f"error:{name}"] = np.linalg.norm(cast[name] - want) / np.linalg.norm(want)
    np.savez(arguments.out, **out)


if __name__ == "__main__":
    main()
