#!/usr/bin/env bash
# Builds, and prints the language module's figures on a CUDA device beside cuBLASLt's, torch's and the CPU's. Takes some minutes, 10 GB of disk.
# usage: gpu_model.sh [FOLDER of bench/run.sh] [more of bench/gpu_model.py]     SHARDKIT_PEERS_PYTHON: a Python with CUDA's torch and transformers
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$HOME/.cache/shardkit/bench}
cmake -S . -B build/release -G Ninja -DCMAKE_BUILD_TYPE=Release -DSHARDKIT_CUDA=ON >/dev/null
cmake --build build/release --target shardkit gpu_model | tail -n 1
SHARDKIT_PEERS_PYTHON=${SHARDKIT_PEERS_PYTHON:-$(tests/peers/install.sh)}
export SHARDKIT_PEERS_PYTHON
mkdir -p "$work"
if [ ! -d "$work/hf" ]; then
  [ -d "$work/mp_rank" ] || "$SHARDKIT_PEERS_PYTHON" bench/make_model.py "$work/mp_rank"
  build/release/bin/shardkit convert "$work/mp_rank" "$work/hf" --to hf -q
fi
python3 bench/gpu_model.py "${@:2}" "$work"
