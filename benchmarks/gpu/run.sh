#!/usr/bin/env bash
# `python -m benchmarks.gpu.suite` on a machine that has Python and a GPU but not SGLang.
#
#   bash benchmarks/gpu/run.sh [options of the suite]
#
# Uses the python3 on PATH, or $PYTHON; where that has no SGLang, what `python -m
# benchmarks.gpu.stage` packed. `make gpu` is the same where `make setup` works.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

python="${PYTHON:-python3}"
log="$(mktemp)"
say() { printf '%s\n' "$*"; }

# ---- an environment with SGLang, FlashInfer and this checkout -------------------------------

bundle=benchmarks/gpu/bundle/site.tar.xz
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch" "$log"' EXIT
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
        { say "run.sh: this checkout did not install"; cat "$log"; exit 1; }
    export PYTHONPATH="$scratch/jenga${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export FLASHINFER_WORKSPACE_BASE="${FLASHINFER_WORKSPACE_BASE:-$scratch}"

"$python" -m benchmarks.gpu.suite "$@"
