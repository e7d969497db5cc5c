#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that are missing for building; does nothing where all are there.
set -euo pipefail

packages=(g++ cmake ninja-build pkg-config libfmt-dev libcli11-dev nlohmann-json3-dev doctest-dev libzstd-dev libxxhash-dev
          libdeflate-dev zlib1g-dev libhdf5-dev libpcre2-dev libutf8proc-dev libevent-dev libsqlite3-dev "$@")
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
sudo=()
[ "$(id -u)" -eq 0 ] || sudo=(sudo)
export DEBIAN_FRONTEND=noninteractive
echo "installing: ${missing[*]}"
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
