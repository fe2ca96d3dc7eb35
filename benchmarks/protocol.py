"""The questions that benchmarks/processes.py asks a benchmark's processes: a line of JSON each, answered by another.

A question names a method and its arguments, {"do": "decode", "tokens": [[5, 6]], "steps": 8}; the answer is what the
method returns, or {"error": why it raised}. Each inference engine, ours and the peers, is a class with these methods:

- `load(model, dtype, max_sequences, context)`: loads the model for up to `max_sequences` sequences of up to `context`
  tokens, prompt and completion together. Answers {"version": the engine's, "seconds": how long loading took, "threads":
  how many compute}.
- `prefill(tokens)`: computes prompts, given as lists of token ids, and one token of each. Answers {"seconds"}.
- `decode(tokens, steps, sampling)`: computes the prompts and then `steps` more tokens of each, all sequences together,
  past any end of text; greedily without `sampling`, {"temperature", "top_k", "top_p", "min_p"}. Answers {"seconds"} of
  those steps alone: len(tokens) * steps tokens.

No question uses cached results of an earlier one. Peers run in environments of their own, where the project is not
installed, and import this file through a link beside them, so it must need the standard library only.
"""

import json
import os
import sys
import time
import traceback


def cores() -> list[int]:
    """The processor's cores that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def check(tokens: list[list[int]], new: int, max_sequences: int, context: int) -> int:
    """The prompts' length. Raises ValueError unless it is the same for all and, with `new` tokens more, fits what is
    loaded."""
    lengths = {len(prompt) for prompt in tokens}
    if len(lengths) != 1 or min(lengths) < 1:
        raise ValueError(f"tokens: {sorted(lengths)} long; prompts must be equally long, at least 1")
    if len(tokens) > max_sequences:
        raise ValueError(f"tokens: {len(tokens)} sequences, loaded for max_sequences={max_sequences}")
    length = lengths.pop()
    if length + new > context:
        raise ValueError(f"tokens: {length} + {new} new ones exceed context={context}")
    return length


class Inference:
    """An engine that knows when each step of a batch ended; `prefill` and `decode` follow from that."""

    limits: tuple[int, int]
    """max_sequences and context, as loaded"""

    def times(self, tokens: list[list[int]], steps: int, sampling: dict | None) -> list[float]:
        """Returns 1 + `steps` times by time.perf_counter: when every sequence had its first token, and when each of the
        next `steps` steps was done. The prompts fit, with as many tokens more. sampling: as for `decode`."""
        raise NotImplementedError

    def prefill(self, tokens: list[list[int]]) -> dict:
        start = time.perf_counter()
        return {"seconds": self._checked_times(tokens, 0)[0] - start}

    def decode(self, tokens: list[list[int]], steps: int, sampling: dict | None = None) -> dict:
        times = self._checked_times(tokens, steps, sampling)
        return {"seconds": times[-1] - times[0]}

    def _checked_times(self, tokens: list[list[int]], steps: int, sampling: dict | None = None) -> list[float]:
        check(tokens, 1 + steps, *self.limits)
        return self.times(tokens, steps, sampling)


def transformers_options(sampling: dict | None) -> dict:
    """The keywords of transformers' `generate` that draw so. Its own defaults would be those of the model's folder."""
    return {"do_sample": False} if sampling is None else {"do_sample": True, **sampling}


def vllm_options(sampling: dict | None) -> dict:
    """The fields of vLLM's SamplingParams that draw so."""
    return {"temperature": 0} if sampling is None else dict(sampling)


def answer(peer: object) -> None:
    """Answers questions until the input ends. Whatever else prints to standard output goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        fields = json.loads(line)
        try:
            reply = getattr(peer, fields.pop("do"))(**fields)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
