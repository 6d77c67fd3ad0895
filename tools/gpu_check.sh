#!/bin/sh
# Tests and measures the engine on a machine with an NVIDIA GPU and a driver, where nothing need be
# installed or fetched: lies in the folder that `make gpu-bundle` makes, beside the programs built
# there. Writes gpu_check.json and, for people, gpu_check.txt.
#
#   gpu_check.sh [SECONDS]   by default 470. The tests always run; of the benchmarks, what finds no
#                            time is left out, training first
#
# With the model's halves (model.gguf.0, model.gguf.1) in the same folder, it is measured too.
set -u
cd "$(dirname "$0")" || exit
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
start=$(date +%s)
limit=${1:-470}
table=$PWD/gpu_check.txt
: >$table
say() { echo "$*" | tee -a $table; }

# part NAME SECONDS COMMAND...: its output in $work/NAME, its complaints in the table. SECONDS at
# most, and no more than are left of all.
part() {
  name=$1 seconds=$2 left=$((limit + start - $(date +%s)))
  shift 2
  [ "$seconds" -le $left ] || seconds=$left
  if [ "$seconds" -lt 2 ]; then
    failed=1 code=124
    say "LEFT OUT, no time: $*"
    return 1
  fi
  timeout "$seconds" "$@" >"$work/$name" 2>"$work/$name.err"
  code=$?
  [ $code = 0 ] && return
  failed=1
  say "FAILED ($code): $*"
  tail -n 20 "$work/$name" "$work/$name.err" >>$table
  return $code
}
# The value of a JSON file, or null.
value() { [ -s "$1" ] && cat "$1" || echo null; }

say "$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2>/dev/null || echo 'no nvidia-smi')"
say "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"

# All tests at once: each suite has a process of its own, for after a fault one gets nothing from the
# device any more, and a folder for the models that it makes. The tests read ../shared/data.
# run NAME SECONDS COMMAND...: in the background, its output in $work/NAME, then its exit code.
mkdir -p tests
cd tests || exit 1
export CHIMERA_TEST_DEVICE=cuda
run() {
  name=$1 seconds=$2
  shift 2
  (
    CHIMERA_BUILD=$work/models.$name timeout "$seconds" "$@" >"$work/$name" 2>&1
    echo $? >"$work/$name.code"
  ) &
}
suites=$(../gpu_tests --gtest_list_tests | sed -n 's/^\([A-Za-z0-9_]*\)\.$/\1/p')
[ -n "$suites" ] || { failed=1; say "FAILED: no tests"; }
for suite in $suites; do
  run "$suite" 60 ../gpu_tests --gtest_brief=1 --gtest_filter="$suite.*" --gtest_output="json:$work/$suite.json"
done
wait
tests=
for suite in $suites; do
  say "tests $suite: $(tail -n 1 "$work/$suite")"
  [ "$(cat "$work/$suite.code")" = 0 ] || { failed=1; tail -n 40 "$work/$suite" >>$table; }
  tests="$tests${tests:+,}$(value "$work/$suite.json")"
done
# What the kernels do to memory and to each other, where the tool for it is there. It makes tests
# slower many times over: those that take longer than this are slow, not wrong.
sanitized=
if command -v compute-sanitizer >/dev/null; then
  for suite in $suites; do
    for tool in memcheck racecheck synccheck; do
      run "$tool.$suite" 40 compute-sanitizer --tool $tool --error-exitcode 9 ../gpu_tests --gtest_brief=1 --gtest_filter="$suite.*"
    done
  done
  wait
  for suite in $suites; do
    for tool in memcheck racecheck synccheck; do
      code=$(cat "$work/$tool.$suite.code")
      [ "$code" = 0 ] || [ "$code" = 124 ] || { failed=1; tail -n 40 "$work/$tool.$suite" >>$table; }
      sanitized="$sanitized${sanitized:+,}\"$tool $suite\":$code"
    done
  done
  say "compute-sanitizer, exit codes (124: not finished): $sanitized"
fi
cd ..

part kernels 120 ./bench_cuda --json "$work/kernels.json" && { say ""; tee -a $table <"$work/kernels"; }

steps=
say ""
say "$(printf '%-13s %-5s %5s %10s %10s %10s %10s %6s' shape type rows ms products attention rest share)"
for run in llama-2-7b:bf16 llama-2-7b:q8_0 llama-2-7b:q4_0 smollm2-135m:bf16 smollm2-135m:q8_0; do
  shape=${run%:*} type=${run#*:}
  part step 55 ./chimera bench --device cuda --shape "$shape" --type "$type" --json || continue
  steps="$steps${steps:+,}$(cat "$work/step")"
  tr '{' '\n' <"$work/step" | awk -v shape="$shape" -v type="$type" -F'[,:]' '/^"rows"/ {
    for (i = 1; i < NF; ++i) { gsub(/[^a-z_]/, "", $i); if (!($i in v)) v[$i] = $(i + 1) }
    printf "%-13s %-5s %5d %10.3f %10.3f %10.3f %10.3f %6.2f\n", shape, type, v["rows"],
           1e3 * v["seconds"], 1e3 * v["products"], 1e3 * v["attention"], 1e3 * v["rest"], v["bandwidth_share"]
    delete v }' | tee -a $table
  sed -n 's/.*"plain_seconds":\([^,]*\),.*"drafting_seconds":\([^}]*\)}.*/\1 \2/p' "$work/step" |
    awk '{ printf "decoding, whole steps: plain %.3f ms, with a draft model %.3f ms\n", 1e3 * $1, 1e3 * $2 }' | tee -a $table
done

model=null training=
if [ -f model.gguf.0 ]; then
  cat model.gguf.* >"$work/model.gguf"
  draft=$(ls ./*.chimera.safetensors 2>/dev/null | head -n 1)
  part model 35 ./chimera bench --device cuda -m "$work/model.gguf" ${draft:+--draft "$draft"} --rounds 1 -n 64 --json
  model=$(value "$work/model")
  say "$model"
  # Training, if there is time left: texts by the model itself, then how many positions a second the
  # draft learns from.
  if [ $(($(date +%s) - start)) -lt $((limit - 90)) ]; then
    part texts 50 ./chimera train data --device cuda -m "$work/model.gguf" --own-prompts 128 --features \
      --sequences 128 -o "$work/texts.jsonl" &&
      part fit 45 ./chimera train fit --device cuda -m "$work/model.gguf" --data "$work/texts.jsonl" --batch 4096 \
        --minutes 0.4 -o "$work/draft"
  fi
  training=$(grep -o '[0-9]* positions/s' "$work/fit.err" 2>/dev/null | tail -n 1)
  say "training: $training"
fi

cat >"$work/all.json" <<END
{"gpu":"$(head -n 1 $table)",
"failed":$failed,
"sanitized":{$sanitized},
"tests":[$tests],
"kernels":$(value "$work/kernels.json"),
"steps":[$steps],
"model":$model,
"training":"$training"}
END
mv "$work/all.json" gpu_check.json
say ""
say "written: gpu_check.json, gpu_check.txt"
exit $failed
