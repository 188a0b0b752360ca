"""Running requests of conversation-like lengths against the byte bound: Jamba's proportions, stock
SGLang at its default cut and at the best of a sweep, and jenga. Real engines.

    python -m benchmarks.engines.bench_lengths
    python -m benchmarks.engines.bench_lengths --requests 120 --strategy no_buffer

Lengths are lognormal with ShareGPT's means, 161 tokens in and 338 out, and every request draws its
own. A state of the tiny model takes the bytes of 1/14 as many tokens as one of Jamba-1.5-mini, and
the lengths are scaled alike. Both sides have the same bytes.

Reported is the mean number of running requests over the decode steps in which others wait. The
byte bound is the same queue on an allocator without pages: a request is admitted when the bytes of
its state, its prompt and its whole answer are free. SGLang keeps room for whole answers where their
lengths are known, as here.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_jenga.testing.engines import EngineFailed, Run, run_engine
from sglang_jenga.testing.families import EXACT, STOCK_STATES
from sglang_jenga.testing.tiny_models import VOCAB_SIZE, write_tiny_model

OVERRIDES = {"num_key_value_heads": 4, "mamba_d_state": 20}
TOKEN_BYTES, STATE_BYTES = 512, 35328  # in float32, as the server logs them
SCALE = 14  # Jamba-1.5-mini's state takes the bytes of 980 tokens, this one's those of 69
MEANS, DEVIATION, LONGEST = (161, 338), 1.0, 2048
RUNNING = 32  # requests of mean length that the bytes are for
DEFAULT_SHARE = 0.9 / 1.9  # of the bytes for states: SGLang's --mamba-full-memory-ratio
SHARES = (0.6, 0.75, 0.85, 0.93)


class Lengths(NamedTuple):
    prompt: int
    answer: int

    @property
    def taken(self) -> int:
        """Bytes that are kept for it while it runs."""
        return STATE_BYTES + (self.prompt + self.answer) * TOKEN_BYTES


def draw(count: int, seed: int = 0) -> list[Lengths]:
    rng = random.Random(seed)

    def length(mean: int) -> int:
        drawn = rng.lognormvariate(math.log(mean) - DEVIATION**2 / 2, DEVIATION)
        return max(2, round(min(drawn, LONGEST) / SCALE))

    return [Lengths(*map(length, MEANS)) for _ in range(count)]


def bound_of(lengths: Sequence[Lengths], pool_bytes: int) -> float:
    """Mean of running requests while others wait, on bytes without pages."""
    queue, running, crowded = deque(lengths), [], []
    while queue:
        while queue and queue[0].taken + sum(each.taken for each, _ in running) <= pool_bytes:
            each = queue.popleft()
            running.append((each, each.answer))
        if queue:
            crowded.append(len(running))
        running = [(each, left - 1) for each, left in running if left > 1]
    return sum(crowded) / len(crowded)


class Row(NamedTuple):
    crowded: float
    most: int
    retractions: int
    outputs: list[list[int]]


def measure(model: Path, lengths: Sequence[Lengths], **arguments: Any) -> Row:
    rng = random.Random(1)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(each.prompt)] for each in lengths]
    run = run_engine(
        model,
        [prompts],
        max_new_tokens=[each.answer for each in lengths],
        env=EXACT,
        seconds=1500,
        chunked_prefill_size=512,
        decode_log_interval=1,
        max_running_requests=256,
        **arguments,
    )
    crowded = running_while_others_wait(run)
    return Row(sum(crowded) / len(crowded), max(run.running), run.retractions, run.outputs[0])


def running_while_others_wait(run: Run) -> list[int]:
    steps = re.findall(r"Decode batch.*?#running-req: (\d+).*?#queue-req: (\d+)", run.log)
    return [int(running) for running, queued in steps if int(queued)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument(
        "--strategy",
        choices=("no_buffer", "extra_buffer_lazy"),
        default="no_buffer",
        help="jenga's --mamba-radix-cache-strategy; stock's is always no_buffer",
    )
    options = parser.parse_args(argv)
    lengths = draw(options.requests)
    mean = Lengths(*(sum(part) // len(lengths) for part in zip(*lengths, strict=True)))
    pool_bytes = RUNNING * (STATE_BYTES + (mean.prompt + mean.answer) * TOKEN_BYTES)
    bound = bound_of(lengths, pool_bytes)
    print(f"{len(lengths)} requests, {mean.prompt} tokens in and {mean.answer} out on average")
    print(f"{'side':22} {'running':>8} {'of bound':>8} {'most':>5} {'retracted':>9} {'same':>9}")
    print(f"{'byte bound':22} {bound:8.1f}", flush=True)

    def cut(share: float) -> dict[str, Any]:
        slots = int(pool_bytes * share) // STATE_BYTES - 1
        tokens = (pool_bytes - (slots + 1) * STATE_BYTES) // TOKEN_BYTES - 1
        return STOCK_STATES | {"max_mamba_cache_size": slots, "max_total_tokens": tokens}

    with tempfile.TemporaryDirectory(prefix="tiny-models-") as folder:
        model = write_tiny_model("jamba", Path(folder) / "jamba", **OVERRIDES)
        jenga = measure(
            model,
            lengths,
            memory_backend="jenga",
            **cut(SHARES[0])
            | {
                "mamba_radix_cache_strategy": options.strategy,
                "disable_overlap_schedule": options.strategy == "no_buffer",
            },
        )

        def show(side: str, row: Row) -> None:
            same = sum(a == b for a, b in zip(row.outputs, jenga.outputs, strict=True))
            print(
                f"{side:22} {row.crowded:8.1f} {100 * row.crowded / bound:7.1f}% {row.most:5} "
                f"{row.retractions:9} {same:4}/{len(lengths)}",
                flush=True,
            )

        show("jenga", jenga)
        for share in (DEFAULT_SHARE, *SHARES):
            try:
                show(f"stock, states {share:.2f}", measure(model, lengths, **cut(share)))
            except EngineFailed:
                print(f"stock, states {share:.2f}: holds no request", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
