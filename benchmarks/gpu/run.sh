#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: tests, benchmarks, servers.
#
#   bash benchmarks/gpu/run.sh [--minutes 9.5] [--out FOLDER]
#
# Uses the python3 on PATH, or $PYTHON; where that has no SGLang, what `python -m
# benchmarks.gpu.stage` packed. A part that fails or runs out of its time does not stop the others.
# Results go to FOLDER ($OUT or gpu-results): summary.md says what ran, every table is a file of its
# own, log.txt is all output.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

minutes=9.5
out="${OUT:-gpu-results}"
python="${PYTHON:-python3}"
while [ $# -gt 0 ]; do
    case "$1" in
        --minutes) minutes="$2" ;;
        --out) out="$2" ;;
        *) echo "run.sh: unknown option $1" >&2; exit 2 ;;
    esac
    shift 2 || { echo "run.sh: $1 needs a value" >&2; exit 2; }
done
mkdir -p "$out" && out="$(cd "$out" && pwd)" || exit 1
log="$out/log.txt"
summary="$out/summary.md"
: >"$log"
started=$SECONDS
budget=$("$python" -c 'import sys; print(int(60 * float(sys.argv[1])))' "$minutes") || exit 1

left() { echo $((budget - (SECONDS - started))); }

say() { printf '%s\n' "$*" | tee -a "$log"; }

# minutes_of SECONDS: the same as minutes, less what the start of a benchmark takes, at most what is
# left. Benchmarks stop by themselves then, with a note of what they did not measure.
minutes_of() {
    local seconds="$1"
    [ "$seconds" -le "$(left)" ] || seconds="$(left)"
    awk -v s="$seconds" 'BEGIN { printf "%.2f", (s > 40 ? s - 20 : s / 2) / 60 }'
}

# part NAME SECONDS COMMAND...: run with at most so many seconds, and leave a line in the summary.
part() {
    local name="$1" seconds="$2" begun=$SECONDS status
    shift 2
    [ "$seconds" -le "$(left)" ] || seconds="$(left)"
    if [ "$seconds" -lt 5 ]; then
        printf '| %s | not run: no time left | - |\n' "$name" >>"$summary"
        return
    fi
    say "== $name: $*"
    timeout --kill-after=10 "$seconds" "$@" >>"$log" 2>&1
    status=$?
    case $status in
        0) status=passed ;;
        124 | 137) status="stopped after $seconds s" ;;
        *) status="failed with status $status" ;;
    esac
    say "== $name: $status"
    printf '| %s | %s | %d s |\n' "$name" "$status" $((SECONDS - begun)) >>"$summary"
}

# ---- an environment with SGLang, FlashInfer and this checkout -------------------------------

bundle=benchmarks/gpu/bundle/site.tar.xz
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
if ! "$python" -c 'import importlib.metadata as m; m.version("sglang")' 2>/dev/null; then
    if [ ! -e "$bundle" ]; then
        say "run.sh: no SGLang here and no $bundle; python -m benchmarks.gpu.stage packs it"
        exit 1
    fi
    tar -xJf "$bundle" -C "$scratch" || exit 1
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi
if ! "$python" -c 'import importlib.metadata as m; m.version("sglang-jenga")' 2>/dev/null; then
    # SGLang finds the plugin by the entry points of an installed distribution. Built from a copy:
    # setuptools leaves its traces where it builds.
    mkdir "$scratch/source"
    cp -r pyproject.toml README.md LICENSE sglang_jenga radix kernels "$scratch/source"
    "$python" -m pip install --quiet --no-deps --no-index --no-build-isolation \
        --target "$scratch/jenga" "$scratch/source" >>"$log" 2>&1 ||
        say "run.sh: this checkout did not install"
    export PYTHONPATH="$scratch/jenga${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export FLASHINFER_WORKSPACE_BASE="${FLASHINFER_WORKSPACE_BASE:-$scratch}"

"$python" -c 'from benchmarks.gpu.timing import machine, require_cuda
require_cuda()
print(machine())' >"$scratch/machine" || exit 2
{
    printf '    bash benchmarks/gpu/run.sh --minutes %s\n\n%s.\n\n' "$minutes" "$(cat "$scratch/machine")"
    printf '| part | result | time |\n|---|---|---|\n'
} >"$summary"
say "$(cat "$scratch/machine")"

# ---- the parts ------------------------------------------------------------------------------

tests=("$python" -m pytest -m gpu -q -p no:cacheprovider --tb=short)
# FlashInfer's kernels are compiled beside the parts that do not need them.
# Under timeout, which takes the compilers along when it is stopped.
timeout 900 "$python" -m benchmarks.gpu.warm >"$scratch/warm" 2>&1 &
warm=$!

part "tests of our kernels and Triton attention" 120 \
    "${tests[@]}" tests/kernels -k 'not flashinfer and not fa3 and not sglang_stores'
part "page operations" 75 "$python" -m benchmarks.gpu.bench_page_ops --minutes "$(minutes_of 75)" \
    --json "$out/page_ops.json" --markdown "$out/page_ops.md"

begun=$SECONDS
while kill -0 "$warm" 2>/dev/null && [ $((SECONDS - begun)) -lt 120 ] && [ "$(left)" -gt 150 ]; do
    sleep 1
done
if kill -0 "$warm" 2>/dev/null; then
    say "FlashInfer's kernels are not all compiled yet; what is missing is compiled when it is used"
fi
cat "$scratch/warm" >>"$log"

part "attention" 170 "$python" -m benchmarks.gpu.bench_attention --minutes "$(minutes_of 170)" \
    --json "$out/attention.json" --markdown "$out/attention.md"
part "tests of FlashInfer, FlashAttention 3 and SGLang's store" 60 \
    "${tests[@]}" tests/kernels -k 'flashinfer or fa3 or sglang_stores'
part "servers against stock" 240 "${tests[@]}" -x tests/servers/test_gpu_server.py
part "live, tiny models" 240 "$python" -m benchmarks.demo
part "live, real sizes" 900 "$python" -m benchmarks.gpu.bench_live \
    --json "$out/live.json" --markdown "$out/live.md"

kill "$warm" 2>/dev/null
say ""
tee -a "$log" <"$summary"
! grep -qE '\| (failed|stopped)' "$summary"
