#!/bin/sh
# setup_llama_cpp.sh DIR [PYTHON]: builds llama.cpp for this machine's CPU from the source that llama-cpp-python's
# source distribution carries. DIR/bin gets the programs, DIR/llama.cpp the source and its converter. PYTHON must have
# pip, and is the one that will run the converter; JOBS is the number of compilers that run at a time, by default 2.
set -eu
python=${2:-python3}
for tool in cmake ninja c++; do
    if ! command -v "$tool" >/dev/null; then
        echo "llama.cpp needs $tool to build: apt-get install cmake ninja-build g++" >&2
        exit 1
    fi
done
mkdir -p "$1"
dir=$(cd "$1" && pwd)
requirements=$(cd "$(dirname "$0")/../benchmarks/peers" && pwd)/requirements_llama_cpp.txt

# An earlier build is deleted, because its cache would keep the settings of another machine.
rm -rf "$dir/download" "$dir"/llama_cpp_python-* "$dir/build"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -m pip download --quiet --no-deps -r "$requirements" -d "$dir/download"
tar -xzf "$dir"/download/llama_cpp_python-*.tar.gz -C "$dir"
rm -rf "$dir/download"
source=$(echo "$dir"/llama_cpp_python-*/vendor/llama.cpp)
ln -sfn "${source#"$dir/"}" "$dir/llama.cpp"
# The converter imports sentencepiece whatever the tokenizer is; in this folder no other peer sees it.
"$python" -m pip install --quiet --upgrade --no-deps --target "$dir/python" sentencepiece==0.2.2

# A release build for this CPU with llama.cpp's defaults, but without OpenSSL and without the web page, a download.
cmake -S "$source" -B "$dir/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF >"$dir/cmake.log"
cmake --build "$dir/build" -j "${JOBS:-2}" \
    --target llama-bench llama-batched-bench llama-completion llama-perplexity llama-quantize llama-server >"$dir/build.log"
ln -sfn build/bin "$dir/bin"
