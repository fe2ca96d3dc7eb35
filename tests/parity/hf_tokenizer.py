"""Run by the peers' Python: what transformers makes of tokenizers and generation settings in folders."""

import json
import sys
from pathlib import Path

import transformers


def main(source: str, target: str) -> None:
    transformers.logging.set_verbosity_error()
    answers = []
    for case in json.loads(Path(source).read_text()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(case["folder"])
        generation = transformers.GenerationConfig.from_pretrained(case["folder"])
        answers.append(
            {
                "special": [tokenizer(text).input_ids for text in case["texts"]],
                "plain": [tokenizer(text, split_special_tokens=True).input_ids for text in case["texts"]],
                "decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in case["ids"]],
                "greedy": generation.get_generation_mode() == "greedy_search",
            }
        )
    Path(target).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
