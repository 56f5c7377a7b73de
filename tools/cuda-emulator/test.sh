#!/bin/sh
# Builds the emulator into a temporary folder and tests it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$here/build.sh" "$out"
g++ -std=c++20 -O1 -march=x86-64-v3 -Wall -Wextra -pthread -o "$out/test" "$here/test/test.cpp" \
    -L "$out" -lcuda -lnvrtc
CUDA_EMULATOR_MEMORY_MIB=512 LD_LIBRARY_PATH="$out" "$out/test" "$here/test"
