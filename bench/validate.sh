#!/usr/bin/env bash
# Builds, and prints validate's times beside transformers' and oneDNN's. Takes some minutes, 10 GB of disk and of memory.
# usage: validate.sh [FOLDER of bench/run.sh]
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$HOME/.cache/shardkit/bench}
samples/install.sh python3 python3-venv libdnnl-dev
cmake -S . -B build/release -G Ninja -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build build/release --target shardkit | tail -n 1
SHARDKIT_PEERS_PYTHON=$(tests/peers/install.sh)
export SHARDKIT_PEERS_PYTHON
mkdir -p "$work"
g++ -O2 -std=c++20 bench/onednn_rate.cpp -o "$work/onednn_rate" -ldnnl
if [ ! -d "$work/hf" ]; then
  [ -d "$work/mp_rank" ] || "$SHARDKIT_PEERS_PYTHON" bench/make_model.py "$work/mp_rank"
  build/release/bin/shardkit convert "$work/mp_rank" "$work/hf" --to hf -q
fi
python3 bench/validate.py "$work/hf" "$work/onednn_rate"
