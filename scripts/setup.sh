#!/bin/sh
# setup.sh VENV [EXTRAS]: makes an environment with this folder's Isthmus, editable, by uv if it is there, else by pip.
set -eu
venv=$1
extras=${2:-}
python=$(sh "$(dirname "$0")/find_python.sh")
target=".${extras:+[$extras]}"
echo "setting up $venv with $("$python" --version) ($python); the packages take a minute or two" >&2
if command -v uv >/dev/null 2>&1; then
    [ -x "$venv/bin/python" ] || uv venv --quiet --python "$python" "$venv"
    uv pip install --quiet --python "$venv/bin/python" -e "$target"
else
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$target"
fi
