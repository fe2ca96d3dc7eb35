"""Completes a batch of prompts in this process: python examples/llm.py MODEL"""

import sys

from isthmus import LLM, RequestError, SamplingParams

PROMPTS = ["def __init__(self", "import ", "class ", "for i in range(", ""]


def main(model: str) -> None:
    sampling = SamplingParams(max_tokens=24, temperature=0.8, seed=1)
    with LLM(model) as llm:
        for prompt, answer in zip(PROMPTS, llm.generate(PROMPTS, sampling, return_errors=True), strict=True):
            if isinstance(answer, RequestError):  # only this prompt's; the others are answered
                print(f"{prompt!r}: {answer}")
            else:
                print(f"{prompt!r} → {answer.text!r} ({answer.finish_reason}, {answer.completion_tokens} tokens)")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} MODEL")
    main(sys.argv[1])
