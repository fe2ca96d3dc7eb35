"""Answers the questions of protocol.py with transformers' `generate` on torch's CPU backend: one static batch, eager,
SDPA attention.

Decoding is timed inside one `generate` call: from when the first new token of every sequence is known until the last.
"""

import time

import torch
import transformers
from protocol import Inference, answer, cores, transformers_options
from transformers import AutoModelForCausalLM
from transformers.generation import StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """Notes when each new token of the batch was known; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Transformers(Inference):
    def load(self, model: str, dtype: str, max_sequences: int, context: int) -> dict:
        """dtype: bfloat16, float16 or float32, as torch names it."""
        start = time.perf_counter()
        torch.set_num_threads(len(cores()))
        self.limits = max_sequences, context
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
        ).eval()
        # Without this, `generate` would stop at an end of text.
        self.model.generation_config.eos_token_id = None
        return {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "seconds": time.perf_counter() - start,
            "threads": torch.get_num_threads(),
        }

    def times(self, tokens: list[list[int]], steps: int, sampling: dict | None) -> list[float]:
        clock = Clock()
        prompts = torch.tensor(tokens)
        with torch.inference_mode():
            self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=1 + steps,
                **transformers_options(sampling),
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        assert len(clock.times) == 1 + steps, f"{len(clock.times)} steps of {1 + steps}"
        return clock.times


if __name__ == "__main__":
    answer(Transformers())
