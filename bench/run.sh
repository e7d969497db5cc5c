#!/usr/bin/env bash
# Builds, and prints the table of the README's section "Speed". Takes some minutes and 10 GB of disk.
set -euo pipefail
cd "$(dirname "$0")/.."
samples/install.sh python3 python3-venv zstd
cmake -S . -B build/release -G Ninja -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build build/release --target shardkit | tail -n 1
SHARDKIT_PEERS_PYTHON=$(tests/peers/install.sh)
export SHARDKIT_PEERS_PYTHON
exec python3 bench/run.py "$@"
