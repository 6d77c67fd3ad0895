#!/bin/sh
# Runs llama.cpp beside this engine: the same file, threads and prompts, in turn. The first call
# builds llama.cpp from the source package of llama-cpp-python, which takes minutes; it is kept
# under the user's cache folder.
#
#   tools/peer_llamacpp.sh [MODEL [ROUNDS [THREADS]]]
set -eu

version=0.3.36
fail() { echo "peer_llamacpp.sh: $1" >&2; exit 1; }

cd "$(dirname "$0")/.."
model=${1:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
rounds=${2:-5}
threads=${3:-$(lscpu -p=CORE,SOCKET | grep -v '^#' | sort -u | wc -l)}
chimera=${CHIMERA_BINARY:-build/chimera}
[ -f "$model" ] || fail "expected a GGUF file, found no $model"
[ "$rounds" -ge 1 ] 2>/dev/null || fail "expected a number of rounds, found $rounds"
[ -x "$chimera" ] || fail "expected $chimera, found none; run make first"

peer=${XDG_CACHE_HOME:-$HOME/.cache}/chimera/llama.cpp-$version
if [ ! -x "$peer/llama-bench" ] || [ ! -x "$peer/llama-completion" ]; then
  command -v cmake >/dev/null || fail 'expected cmake, found none; apt install cmake, or pip install cmake'
  mkdir -p "$peer"
  tmp=$(mktemp -d "$peer/build.XXXXXX")
  trap 'rm -rf "$tmp"' EXIT
  trap 'exit 130' INT TERM
  echo "building llama.cpp (llama-cpp-python $version) in $peer; this takes minutes ..." >&2
  python3 -m pip download --quiet --disable-pip-version-check --no-deps \
    --no-binary llama-cpp-python --dest "$tmp" "llama-cpp-python==$version" >&2 ||
    fail "pip could not download llama-cpp-python==$version; check the network"
  tar -xzf "$tmp"/*.tar.gz -C "$tmp"
  source=$(echo "$tmp"/*/vendor/llama.cpp)
  { cmake -S "$source" -B "$tmp/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
      -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
      -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF &&
    cmake --build "$tmp/build" -j "$(nproc)" --target llama-bench llama-completion
  } >"$peer/build.log" 2>&1 || fail "llama.cpp does not build here; see $peer/build.log"
  mv "$tmp"/build/bin/llama-bench "$tmp"/build/bin/llama-completion "$peer"
fi

prompts=$(mktemp)
results=$(mktemp)
output=$(mktemp)
trap 'rm -rf "$prompts" "$results" "$output" "${tmp:-}"' EXIT
trap 'exit 130' INT TERM
# Openings, since both go on with raw text here; llama.cpp is told to ignore an end.
cat >"$prompts" <<'END'
Once upon a time there was a lighthouse keeper who found a letter. It said that
The following text explains, step by step, how bread is made at home. First,
The history of the bicycle, from the first wooden machines to the present day, begins
END

# What a program says, for figure() to read.
try() { "$@" >"$output" 2>&1 </dev/null || fail "$1 failed: $(tail -n 1 "$output")"; }
# A line "NAME VALUE"; the value is what the sed expression prints.
figure() {
  value=$(sed -n "$2" "$output")
  [ -n "$value" ] || fail "expected a figure for $1, found none in: $(tail -n 1 "$output" | cut -c 1-200)"
  echo "$1 $value"
}
round() {
  while read -r prompt; do
    try "$chimera" run -m "$model" --raw --threads "$threads" -n 128 -p "$prompt" --drafter none --json
    figure decode_chimera 's/.*"tokens_per_second":\([0-9.e+-]*\).*/\1/p'
    try "$peer/llama-completion" -m "$model" -t "$threads" -n 128 -p "$prompt" --temp 0 -no-cnv \
      --ignore-eos --perf
    figure decode_llama.cpp 's/.*  eval time.*, *\([0-9.]*\) tokens per second.*/\1/p'
  done <"$prompts"
  try "$chimera" bench -m "$model" --threads "$threads" -n 2 --rounds 1 --json
  figure prefill512_chimera 's/.*"prefill_tokens_per_second":\([0-9.e+-]*\).*/\1/p'
  try "$peer/llama-bench" -m "$model" -t "$threads" -p 512 -n 128 -r 1 -o jsonl
  figure prefill512_llama.cpp 's/.*"n_prompt": 512,.*"avg_ts": \([0-9.]*\).*/\1/p'
  figure tg128_llama.cpp 's/.*"n_gen": 128,.*"avg_ts": \([0-9.]*\).*/\1/p'
}
i=0
while [ "$i" -lt "$rounds" ]; do
  i=$((i + 1))
  [ ! -t 2 ] || printf '\rround %d of %d' "$i" "$rounds" >&2
  round >>"$results"
done
[ ! -t 2 ] || printf '\r\033[K' >&2

echo "$(lscpu | sed -n 's/^Model name: *//p'), $threads threads, $(basename "$model"); tokens/s, median (lowest..highest) of $rounds rounds"
sort -k1,1 -k2,2g "$results" | awk '
  function row() { if (n) { m = (v[int((n + 1) / 2)] + v[int(n / 2) + 1]) / 2; median[name] = m
    printf "%-24s %8.1f (%.1f..%.1f)\n", name, m, v[1], v[n] } }
  $1 != name { row(); name = $1; n = 0 }
  { v[++n] = $2 }
  END { row()
    printf "decoding: %.2f times llama.cpp\n", median["decode_chimera"] / median["decode_llama.cpp"]
    printf "prefill:  %.2f times llama.cpp\n", median["prefill512_chimera"] / median["prefill512_llama.cpp"] }'
