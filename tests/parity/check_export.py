"""Run by the peers' Python: transformers loads FOLDER without a key amiss and writes its logits of TOKENS to OUT.

    python tests/parity/check_export.py FOLDER TOKENS.npy OUT.npy

TOKENS is integers [tokens] or [batch, tokens] without padding; OUT gets float32 of that shape and [vocab].
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


def load(folder: Path) -> Any:
    """The model in float32 and eager mode. Asserts that no key is missing, unexpected or of another shape."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    assert model.config._attn_implementation == model.config._experts_implementation == "eager"
    return model.eval()


@torch.no_grad()
def write_logits(model: Any, tokens: Path, out: Path) -> None:
    ids = np.load(tokens).astype(np.int64)
    logits = model(torch.from_numpy(np.atleast_2d(ids)), use_cache=False).logits.float().numpy()
    np.save(out, logits.reshape(*ids.shape, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write_logits(load(args.folder), args.tokens, args.out)


if __name__ == "__main__":
    main()
