"""What jenga costs: throughput of a dense model, and host time of memory calls per decode step.

    python -m benchmarks.engines.bench_cost             # five pairs, CPU engine
    python -m benchmarks.engines.bench_cost --pairs 9

Stock and jenga alternate in pairs on the same bytes and prompts; the ratio is the median of
pairs. Host time is measured inside the real scheduler, around SGLang's own calls: the decode
capacity check and the decode allocation (slides, allocator, row and mapping writes), batch 64.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.tiny_models import VOCAB_SIZE, write_tiny_model

BATCH = 64
PROMPT = 96
NEW_TOKENS = 160
TIMED = (
    ("check", "sglang.srt.managers.schedule_batch", "ScheduleBatch.check_decode_mem"),
    ("alloc", "sglang.srt.managers.schedule_batch", "alloc_for_decode"),
)


def time_memory_calls() -> None:
    """Wrap the scheduler's memory calls in this process and its forks; logs every 100 steps."""
    import importlib
    import logging

    logger = logging.getLogger("bench_cost")
    spent = {name: 0.0 for name, _, _ in TIMED}
    steps = [0]

    def wrap(name: str, owner: Any, attribute: str) -> None:
        original = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start
                if name == "alloc" and len(args[0].reqs) == BATCH:
                    steps[0] += 1
                    if steps[0] == 20:  # warm
                        spent.update(dict.fromkeys(spent, 0.0))
                    elif steps[0] == 120:
                        parts = " ".join(
                            f"{key}={value / 100 * 1e6:.1f}" for key, value in spent.items()
                        )
                        logger.warning("memory calls per step, us: %s", parts)

        setattr(owner, attribute, timed)

    for name, module_name, path in TIMED:
        owner: Any = importlib.import_module(module_name)
        *parents, attribute = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        wrap(name, owner, attribute)


def engine(model: Path, backend: str, **arguments: Any) -> tuple[float, float, Run]:
    """Output tokens per second, microseconds of memory calls per decode step, and the run."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(PROMPT)] for _ in range(BATCH)]
    warm = [[5, 6, 7]]
    run = run_engine(
        model,
        [warm, prompts],
        max_new_tokens=NEW_TOKENS,
        prepare=time_memory_calls,
        seconds=900,
        max_total_tokens=BATCH * (PROMPT + NEW_TOKENS + 64),
        max_running_requests=BATCH,
        decode_log_interval=1000,
        memory_backend=backend,
        **arguments,
    )
    found = re.search(r"memory calls per step, us: check=([\d.]+) alloc=([\d.]+)", run.log)
    micros = sum(float(number) for number in found.groups()) if found else float("nan")
    return BATCH * NEW_TOKENS / run.seconds[1], micros, run


def compare(title: str, model: Path, pairs: int, **arguments: Any) -> None:
    ratios, stock_us, jenga_us = [], [], []
    for _ in range(pairs):
        stock, stock_micros, stock_run = engine(model, "default", **arguments)
        jenga, jenga_micros, jenga_run = engine(model, "jenga", **arguments)
        ratios.append(jenga / stock)
        stock_us.append(stock_micros)
        jenga_us.append(jenga_micros)
        same = stock_run.outputs == jenga_run.outputs
        print(
            f"  {title}: stock {stock:7.1f} tok/s  jenga {jenga:7.1f} tok/s"
            f"  ratio {jenga / stock:.3f}"
            f"  memory calls {stock_micros:.0f} / {jenga_micros:.0f} us per step"
            f"  same tokens {'yes' if same else 'no'}",
            flush=True,
        )
    print(
        f"{title}: throughput ratio {statistics.median(ratios):.3f} (median of {pairs} pairs), "
        f"memory calls per decode step {statistics.median(stock_us):.0f} us stock, "
        f"{statistics.median(jenga_us):.0f} us jenga, batch {BATCH}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tiny-models-") as folder:
        model = write_tiny_model("llama", Path(folder) / "llama")
        for page_size in (1, 16):
            compare(f"llama, page {page_size}", model, options.pairs, page_size=page_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
