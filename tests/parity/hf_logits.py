"""Run by the peers' Python: logits of a transformers model for weights and tokens in an .npz file."""

import json
import sys

import numpy as np
import torch
import transformers


def main(source: str, target: str) -> None:
    arrays = dict(np.load(source))
    spec = json.loads(bytes(arrays.pop("spec")).decode())
    tokens = torch.from_numpy(arrays.pop("tokens")).long()
    config = getattr(transformers, spec["config_class"])(**spec["config"], attn_implementation="eager")
    model = getattr(transformers, spec["model_class"])(config).eval().float()
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    with torch.no_grad():
        np.save(target, model(tokens).logits.numpy())


main(sys.argv[1], sys.argv[2])
