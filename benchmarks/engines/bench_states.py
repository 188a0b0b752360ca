"""State layers beside attention on equal bytes: stock at its default cut, stock at the best cut of
a sweep, and jenga, which has no cut. Real engines.

    python -m benchmarks.engines.bench_states                # both geometries, all workloads
    python -m benchmarks.engines.bench_states qwen3-next --workloads short shift

A state of the tiny models takes as many tokens' bytes as a 1/14 of the real models' does, and the
prompts are scaled alike: `short` stands for 512 tokens in and 128 out, `long` for 16k in, `shift`
for short ones first and long ones after. Stock's cut is --max-mamba-cache-size; what is left of the
bytes is KV. Reported: answer tokens per decode step (mean concurrency), over the whole workload.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from sglang_jenga.testing.engines import EngineFailed, run_engine
from sglang_jenga.testing.families import EXACT, STOCK_STATES
from sglang_jenga.testing.tiny_models import VOCAB_SIZE, write_tiny_model

DEFAULT_RATIO = 0.9  # of state bytes to KV bytes, SGLang's --mamba-full-memory-ratio
SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.85)
"""Shares of the bytes that states get, for the sweep."""
STATES_PER_REQUEST = 3  # so many slots stock counts per running request


class Geometry(NamedTuple):
    """A tiny model, and the bytes of a token's KV and of a state that its server logs (float32)."""

    family: str
    overrides: dict[str, Any]
    token_bytes: int
    state_bytes: int


GEOMETRIES = {
    "qwen3-next": Geometry(
        "qwen3_next", {"linear_key_head_dim": 32, "linear_value_head_dim": 32}, 256, 58368
    ),
    "falcon-h1": Geometry(
        "falcon_h1",
        {"mamba_d_ssm": 128, "mamba_d_head": 32, "mamba_d_state": 128},
        1024,
        280576,
    ),
}
SHORT, LONG, NEW_TOKENS = 37, 1160, 9
WORKLOADS = {"short": ((72, SHORT),), "long": ((16, LONG),), "shift": ((72, SHORT), (16, LONG))}
RUNNING = 24  # short requests that the bytes are for


class Row(NamedTuple):
    per_step: float
    most: int
    retractions: int
    outputs: list[list[list[int]]]


def measure(model: Path, waves: list[list[list[int]]], **arguments: Any) -> Row:
    run = run_engine(
        model,
        waves,
        max_new_tokens=NEW_TOKENS,
        env=EXACT,
        seconds=900,
        chunked_prefill_size=512,
        decode_log_interval=1,
        max_running_requests=256,
        **arguments,
    )
    running = run.running
    return Row(sum(running) / len(running), max(running), run.retractions, run.outputs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("geometries", nargs="*", choices=[*GEOMETRIES, []], help="default: both")
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS], default=[*WORKLOADS])
    options = parser.parse_args(argv)
    print(
        f"{'geometry':11} {'workload':8} {'stock default':>13} {'best swept (share)':>18} "
        f"{'jenga':>6} {'of default':>10} {'of best':>8} {'most running':>14} "
        f"{'retracted':>9} {'same':>5}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="tiny-models-") as folder:
        for name in options.geometries or GEOMETRIES:
            geometry = GEOMETRIES[name]
            model = write_tiny_model(geometry.family, Path(folder) / name, **geometry.overrides)
            for workload in options.workloads:
                _row(name, geometry, model, workload)
    return 0


def _row(name: str, geometry: Geometry, model: Path, workload: str) -> None:
    rng = random.Random(0)
    waves = [
        [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for _ in range(count)]
        for count, length in WORKLOADS[workload]
    ]
    request_bytes = (SHORT + NEW_TOKENS) * geometry.token_bytes + geometry.state_bytes
    pool_bytes = RUNNING * request_bytes

    def cut(share: float) -> dict[str, int]:
        slots = int(pool_bytes * share) // geometry.state_bytes - 1
        rest = pool_bytes - (slots + 1) * geometry.state_bytes
        return {
            "max_mamba_cache_size": slots,
            "max_total_tokens": rest // geometry.token_bytes - 1,
        }

    swept: dict[float, Row] = {}
    for share in (DEFAULT_RATIO / (1 + DEFAULT_RATIO), *SHARES):
        try:
            swept[share] = measure(model, waves, **STOCK_STATES | cut(share))
        except EngineFailed:
            continue  # this cut holds no request of the workload
    if not swept:
        raise SystemExit(f"{name}: no cut of {pool_bytes} bytes holds a request of {workload}")
    default = next(iter(swept.values()))  # the first that boots, if SGLang's own does not
    best_share = max(swept, key=lambda share: swept[share].per_step)
    best = swept[best_share]
    # Any cut pins the same bytes for jenga.
    jenga = measure(model, waves, memory_backend="jenga", **STOCK_STATES | cut(SHARES[2]))
    same = sum(
        ours == theirs
        for wave, other in zip(jenga.outputs, best.outputs, strict=True)
        for ours, theirs in zip(wave, other, strict=True)
    )
    print(
        f"{name:11} {workload:8} {default.per_step:13.1f} {best.per_step:11.1f} ({best_share:.2f}) "
        f"{jenga.per_step:6.1f} {jenga.per_step / default.per_step:9.2f}x "
        f"{jenga.per_step / best.per_step:7.2f}x "
        f"{f'{default.most}/{best.most}/{jenga.most}':>14} "
        f"{f'{best.retractions}/{jenga.retractions}':>9} "
        f"{same:3}/{sum(map(len, waves))}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
