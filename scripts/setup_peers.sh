#!/bin/sh
# setup_peers.sh VENV: what Isthmus is measured against and compared with, in an environment of its own. torch's CPU
# build comes from pip's own index settings, so pip it is, and Python 3.11, which it has wheels for.
set -eu
venv=$1
for candidate in "${PEERS_PYTHON:-}" "$(command -v python3.11 || true)" "$HOME"/.pyenv/versions/3.11.*/bin/python /usr/bin/python3.11; do
    if [ -x "$candidate" ] && "$candidate" -c "import sys, venv; sys.exit(sys.version_info[:2] != (3, 11))" 2>/dev/null; then
        "$candidate" -m venv "$venv"
        set -- "$venv/bin/python" -m pip install --quiet --disable-pip-version-check
        "$@" -r "$(dirname "$0")/../benchmarks/peers/requirements.txt"
        # Only for the published chat templates in it, which tests/parity reads: nothing of what it depends on.
        exec "$@" --no-deps trl==1.16.0
    fi
done
echo "the peers need Python 3.11 with venv; name one: PEERS_PYTHON=/path/to/python3.11 make peers" >&2
exit 1
