#!/bin/sh
# Runs the CPU kernels' tests with the address and undefined-behaviour sanitizers, then for x86-64 without AVX.
# Needs g++ with its sanitizers' libraries, on x86-64. Usage: scripts/check_kernels.sh [PYTHON]
set -eu
cd "$(dirname "$0")/.."
python=$(command -v "${1:-.venv/bin/python}")
home=$(mktemp -d)
sanitized=
trap 'kill $sanitized 2>/dev/null || true; rm -rf "$home"' EXIT

# Builds the kernels for -march=$1 with the flags that follow, where a process whose HOME is $home/$1 finds them.
build() {
    mkdir -p "$home/$1"
    HOME="$home/$1" "$python" - "$@" <<'PYTHON'
import sys
from isthmus.model.ops.cpu import library
library.build(library.user_folder(), sys.argv[1], sys.argv[2:])
PYTHON
}

# Tests the kernels built for -march=$1 in the environment that follows, after checking that they are the ones loaded.
check() {
    march=$1
    shift
    env HOME="$home/$march" "$@" "$python" - <<'PYTHON'
import sys
from pathlib import Path
import pytest
from isthmus.model.ops.cpu import library
path = library.load().path
assert Path.home() in path.parents, path
print("testing", path.name, flush=True)
# The tests run in one process, and whatever a sanitizer says goes straight to the terminal.
arguments = ["-p", "no:xdist", "--capture=no", "--durations=0", "--durations-min=60"]
names = ("linear", "linear_calls", "attention", "elementwise")
sys.exit(pytest.main([*arguments, *(f"tests/model/ops/test_cpu_{name}.py" for name in names)]))
PYTHON
}

library_of() { g++ -print-file-name="lib$1.so"; }

build native -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1
check native LD_PRELOAD="$(library_of asan) $(library_of ubsan)" ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 &
sanitized=$!

# Beside them, since each is one process.
if [ "$(uname -m)" = x86_64 ]; then
    build x86-64
    check x86-64 >"$home/log" 2>&1 || { cat "$home/log"; exit 1; }
    cat "$home/log"
fi
wait $sanitized
