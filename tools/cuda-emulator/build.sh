#!/bin/sh
# Builds the emulated libcuda and libnvrtc into a folder: build.sh OUTDIR
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh OUTDIR}
mkdir -p "$out/device"
out=$(cd "$out" && pwd)

flags="-std=c++20 -O3 -Wno-restrict -g1 -march=x86-64-v3 -fPIC -shared -Wall -Wextra -fvisibility=hidden"
cd "$here/src"
g++ $flags -pthread -Wl,-soname,libcuda.so.1 -Wl,-Bsymbolic -o "$out/libcuda.so" \
    device.cpp faults.cpp launch.cpp memory.cpp module.cpp sanitizer.cpp scheduler.cpp stream.cpp \
    warp_operations.cpp -ldl &
driver=$!
g++ $flags -Wl,-soname,libnvrtc.so.13 -o "$out/libnvrtc.so" nvrtc.cpp -ldl
wait $driver
ln -sf libcuda.so "$out/libcuda.so.1"
for version in 12 13; do ln -sf libnvrtc.so "$out/libnvrtc.so.$version"; done
cp "$here"/device/*.cuh "$out/device/"
