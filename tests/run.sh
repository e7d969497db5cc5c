#!/usr/bin/env bash
# Installs, builds and passes all tests, on a bare Debian or Ubuntu machine. Ends with ctest's summary.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=$(nproc)

samples/install.sh python3 python3-venv
samples/install.sh qemu-user || echo "no qemu-user: old processors will not be tried"
samples/install.sh chromium || echo "no chromium: the tests of pages will be skipped"  # Ubuntu has it as a snap only

# Sanitizers first: they find what the release build would hide.
cmake -S . -B build/asan -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS=-O1 -DSHARDKIT_SANITIZE=address,undefined -DSHARDKIT_CUDA=OFF >/dev/null
cmake --build build/asan -j "$jobs" | tail -n 1
cmake -S . -B build/release -G Ninja -DCMAKE_BUILD_TYPE=Release -DSHARDKIT_TESTS=ON >/dev/null
cmake --build build/release -j "$jobs" | tail -n 1

SHARDKIT_PEERS_PYTHON=$(tests/peers/install.sh)
export SHARDKIT_PEERS_PYTHON

echo "sanitized:"
ctest --test-dir build/asan -L "fast|attacks|gpu_emulated" --output-on-failure -j "$jobs"
echo "release:"
ctest --test-dir build/release --output-on-failure -j "$jobs"
