#!/usr/bin/env bash
# Installs the real packages that read what shardkit writes, outside this folder and kept between runs; prints their Python.
set -euo pipefail
cd "$(dirname "$0")"
peers=${SHARDKIT_PEERS_ENV:-$HOME/.cache/shardkit/peers}
wanted=$(cat requirements.txt)
mkdir -p "$(dirname "$peers")"
exec 9>"$peers.lock"
flock 9  # two installs at once would leave a broken one
if [ "$(cat "$peers/installed.txt" 2>/dev/null)" != "$wanted" ]; then
  rm -rf "$peers"
  python3 -m venv "$peers"
  "$peers/bin/pip" install -q --disable-pip-version-check -r requirements.txt >&2
  echo "$wanted" >"$peers/installed.txt"
fi
# What needs no more than is there. Every time: a new one must not cost a new torch.
"$peers/bin/pip" install -q --disable-pip-version-check --no-deps -r requirements-no-deps.txt >&2
echo "$peers/bin/python"
