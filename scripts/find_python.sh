#!/bin/sh
# Prints the newest Python 3.13, 3.12 or 3.11 found on PATH or where the usual managers put theirs.
# PYTHON=… overrides. Fails with a message that says what to do.
set -u

usable() { # a name may be a manager's shim behind which there is no Python, so it is run
    "$1" -c "import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != ($2))" >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    for version in "3, 13" "3, 12" "3, 11"; do
        usable "$PYTHON" "$version" && echo "$PYTHON" && exit 0
    done
    echo "PYTHON=$PYTHON is not a working Python 3.11, 3.12 or 3.13 with venv (on Debian: apt install python3-venv)." >&2
    exit 1
fi

for minor in 13 12 11; do
    for candidate in \
        "$(command -v python3.$minor 2>/dev/null)" \
        "$HOME"/.pyenv/versions/3.$minor.*/bin/python \
        "$HOME"/.local/share/uv/python/cpython-3.$minor.*/bin/python3 \
        "$HOME"/.asdf/installs/python/3.$minor.*/bin/python \
        "$HOME"/.local/share/mise/installs/python/3.$minor*/bin/python \
        "$HOME"/miniconda3/envs/*/bin/python3.$minor "$HOME"/miniconda3/bin/python3.$minor \
        "$HOME"/miniforge3/envs/*/bin/python3.$minor "$HOME"/miniforge3/bin/python3.$minor \
        "$HOME"/anaconda3/bin/python3.$minor /opt/conda/bin/python3.$minor \
        /opt/homebrew/bin/python3.$minor /usr/local/bin/python3.$minor /opt/python/3.$minor*/bin/python3 \
        /usr/bin/python3.$minor
    do
        [ -x "$candidate" ] && usable "$candidate" "3, $minor" && echo "$candidate" && exit 0
    done
done

echo "No Python 3.11, 3.12 or 3.13 with venv was found. Install one (Debian: apt install python3.11 python3.11-venv;" >&2
echo "pyenv: pyenv install 3.13; uv: uv python install 3.13), or name one: make PYTHON=/path/to/python3.13" >&2
exit 1
