"""Calls a running server (isthmus serve --model MODEL): python examples/client.py HOST:PORT"""

import sys

from isthmus import Client, InvalidRequest, RequestError

PROMPTS = ["def __init__(self", "import ", "class ", "for i in range("]


def main(address: str) -> int:
    with Client(address) as client:
        try:
            for completion in client.generate(PROMPTS, max_tokens=24, temperature=0):
                print(repr(completion.text))
            for delta in client.stream("import ", max_tokens=24):
                print(delta.text, end="", flush=True)
            print()
            client.generate("import ", temperature=-1)
        except InvalidRequest as error:
            print(f"as it should be, {error.field} is refused: {error.message}")
        except RequestError as error:  # of a list it is a BatchError, whose `errors` has each item's
            print(f"{address}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} HOST:PORT")
    sys.exit(main(sys.argv[1]))
