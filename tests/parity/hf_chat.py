"""Run by the peers' Python: conversations as transformers writes them with the templates that trl comes with."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers


def tokenizer_of(tokens: dict, template: str) -> transformers.PreTrainedTokenizerFast:
    """A token a character, special tokens apart."""
    inner = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer: transformers.PreTrainedTokenizerFast, case: dict) -> dict:
    """{"text"} or {"error", "refused"}: refused is whether the template itself did."""
    try:
        text = tokenizer.apply_chat_template(
            case["messages"],
            tokenize=False,
            add_generation_prompt=case["add_generation_prompt"],
            **case["arguments"],
        )
    except Exception as error:
        return {"error": str(error), "refused": type(error).__name__ == "TemplateError"}
    return {"text": text}


def assistant(tokenizer: transformers.PreTrainedTokenizerFast, case: dict) -> list[int] | None:
    """Which characters the assistant's tokens cover; None when it can't be written."""
    try:
        out = tokenizer.apply_chat_template(
            case["messages"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            add_generation_prompt=case["add_generation_prompt"],
            tokenizer_kwargs={"return_offsets_mapping": True},
            **case["arguments"],
        )
    except Exception:
        return None
    covered = [range(*ends) for ends, mask in zip(out["offset_mapping"], out["assistant_masks"], strict=True) if mask]
    return sorted({index for span in covered for index in span})


def main(source: str, target: str) -> None:
    spec = json.loads(Path(source).read_text())
    trl = find_spec("trl")
    if trl is None:
        sys.exit("no trl in .venv-peers: remove the folder, and `make peers` builds it anew")
    folder = Path(trl.submodule_search_locations[0]) / "chat_templates"
    answers = {}
    for family in spec["families"]:
        template = (folder / f"{family}.jinja").read_text(encoding="utf-8")
        tokenizer = tokenizer_of(spec["tokens"], template)
        answers[family] = {"template": template, "rendered": [rendered(tokenizer, case) for case in spec["cases"]]}
        if family.endswith("_training"):
            answers[family]["assistant"] = [assistant(tokenizer, case) for case in spec["cases"]]
    Path(target).write_text(json.dumps(answers))


main(sys.argv[1], sys.argv[2])
