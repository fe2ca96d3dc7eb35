"""Streams several answers at once on one event loop, as a web server would: python examples/async_streams.py MODEL"""

import asyncio
import sys

from isthmus import LLM, AsyncModel

PROMPTS = ["def __init__(self", "import ", "class ", "for i in range("]


async def show(model: AsyncModel, prompt: str) -> None:
    text = ""
    async for delta in model.stream(prompt, max_tokens=24, temperature=0):  # leaving the loop ends the request
        text += delta.text
        if delta.completion is not None:
            print(f"{prompt!r} → {text!r}, first token after {delta.completion.time_to_first_token * 1000:.0f} ms")


async def main(path: str) -> None:
    with LLM(path) as llm:  # an AsyncClient(address) does as well: both are AsyncModels
        await asyncio.gather(*(show(llm.aio, prompt) for prompt in PROMPTS))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} MODEL")
    asyncio.run(main(sys.argv[1]))
