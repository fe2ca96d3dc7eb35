"""A tiny published model that one can talk to: the Llama of tests/parity/golden with a tokenizer and a template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Inner

from tests.parity.weights import family_tensors

GOLDEN = Path(__file__).parents[1] / "parity" / "golden" / "llama3"
CHAT_ML = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
START, END = "<|im_start|>", "<|im_end|>"
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789.,?!+=-"


def write_chat_model(folder: Path) -> Path:
    """Ids: 1 <s>, 2 </s>, 3 <|im_start|>, 4 <|im_end|>, then a character each. Drawing 2 or 4 ends a text."""
    folder.mkdir(parents=True)
    shutil.copyfile(GOLDEN / "config.json", folder / "config.json")
    save_file(family_tensors(GOLDEN), folder / "model.safetensors")
    tokens = ["<unk>", "<s>", "</s>", START, END]
    vocab = {token: index for index, token in enumerate([*tokens, *CHARACTERS])}
    inner = Inner(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": CHAT_ML}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    return folder


def write_chats(path: Path, count: int = 40) -> Path:
    """Sums, a conversation a line."""
    with path.open("w") as lines:
        for index in range(count):
            a, b = index % 7, index % 5
            messages = [
                {"role": "user", "content": f"{a} + {b}?"},
                {"role": "assistant", "content": f"it is {a + b}."},
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return path
