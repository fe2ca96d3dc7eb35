#!/bin/sh
# setup_peers.sh VENV: installs what Isthmus is compared with into an environment of its own. It uses pip, whose
# settings say which index has torch's CPU build, and Python 3.11, for which that build has wheels.
set -eu
venv=$1
for candidate in "${PEERS_PYTHON:-}" "$(command -v python3.11 || true)" "$HOME"/.pyenv/versions/3.11.*/bin/python /usr/bin/python3.11; do
    if [ -x "$candidate" ] && "$candidate" -c "import sys, venv; sys.exit(sys.version_info[:2] != (3, 11))" 2>/dev/null; then
        "$candidate" -m venv "$venv"
        set -- "$venv/bin/python" -m pip install --quiet --disable-pip-version-check
        "$@" -r "$(dirname "$0")/../benchmarks/peers/requirements.txt"
        # tests/parity reads nothing of trl but its published chat templates, so its dependencies aren't needed.
        exec "$@" --no-deps trl==1.16.0
    fi
done
echo "the peers need Python 3.11 with venv; name one: PEERS_PYTHON=/path/to/python3.11 make peers" >&2
exit 1
