#!/bin/sh
# check_wheel.sh [PYTHON]: tries the wheel as a user gets it, in a fresh environment, beside a project that has a
# model.py, a train.py and a serve/ of its own. PYTHON must have hatchling.
set -eu
python=$(command -v "${1:-.venv/bin/python}")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

(cd "$root" && "$python" -m hatchling build -t wheel -d "$work/dist" >/dev/null)
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$work"/dist/isthmus-*.whl

names=$("$work/venv/bin/python" -m pip show -f isthmus | sed -n 's#^  \([^./][^/]*\)/.*#\1#p' | grep -v dist-info | sort -u)
[ "$names" = isthmus ] || { echo "the wheel installs $names, not isthmus alone" >&2; exit 1; }

mkdir -p "$work/project/serve"
cd "$work/project"
echo 'MINE = "model"' > model.py
echo 'MINE = "train"' > train.py
echo 'MINE = "serve"' > serve/__init__.py
cat > main.py <<'PYTHON'
import sys

import model, serve, train
import isthmus
from isthmus import Client, ConfigError

assert (model.MINE, train.MINE, serve.MINE) == ("model", "train", "serve")
assert "jax" not in sys.modules, "importing Client imports jax"

import isthmus.model.transformer, isthmus.serve.engine.engine, isthmus.train.loop
assert "site-packages" in isthmus.model.transformer.__file__, isthmus.model.transformer.__file__
print("the project's modules and isthmus both work:", isthmus.__file__)
PYTHON
"$work/venv/bin/python" main.py
"$work/venv/bin/isthmus" --version
"$work/venv/bin/python" -m isthmus train --help >/dev/null
