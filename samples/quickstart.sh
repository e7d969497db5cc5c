#!/usr/bin/env bash
# Installs what is missing, builds shardkit, and does its main job on a bundled checkpoint that Megatron wrote.
# usage: samples/quickstart.sh [FOLDER for the results; default: a temporary one]
set -euo pipefail
cd "$(dirname "$0")/.."

samples/install.sh
if [ ! -f build/release/build.ninja ]; then
  cmake -S . -B build/release -G Ninja -DCMAKE_BUILD_TYPE=Release -DSHARDKIT_TESTS=OFF -DSHARDKIT_CUDA=OFF >/dev/null
fi
echo "building (the first time takes a minute or two) …"
cmake --build build/release --target shardkit | tail -n 1

shardkit=$PWD/build/release/bin/shardkit
source=tests/data/legacy/llama_untied_bf16/tp2pp2
out=${1:-$(mktemp -d)}
run() { echo; echo "\$ shardkit $*"; "$shardkit" "$@"; }

echo
echo "A checkpoint that Megatron wrote with tensor parallel size 2 and two pipeline stages: four rank files."
run inspect "$source" --tensors 'decoder.layers.0.*'
echo
echo "The same model for tensor parallel size 4 and one stage, and as torch_dist:"
run reshard "$source" "$out/tp4" --tp 4 --pp 1
run convert "$source" "$out/dist" --to torch_dist
echo
echo "Both are whole:"
run verify "$out/tp4"
run verify "$out/dist"
echo
echo "And they hold the same weights, whatever the layout and the format:"
for checkpoint in "$source" "$out/tp4" "$out/dist"; do "$shardkit" hash -q "$checkpoint"; done
different=$(for checkpoint in "$source" "$out/tp4" "$out/dist"; do "$shardkit" hash -q "$checkpoint" | cut -d' ' -f1; done | sort -u | wc -l)
echo
if [ "$different" -ne 1 ]; then echo "the digests differ: this should never happen"; exit 1; fi
echo "one digest: nothing was lost. Results are in $out; the program is build/release/bin/shardkit."
