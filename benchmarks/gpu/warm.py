"""Compile FlashInfer's kernels for all benchmarks and tests at once, one process per kernel.

    python -m benchmarks.gpu.warm

FlashInfer compiles a kernel when it is first planned, for minutes on one core if nobody does it
before. Each process plans a tiny batch through the very code that the benchmarks run, so what they
need is what gets compiled; the results lie in FlashInfer's cache.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sglang_jenga.testing.attention_layouts import GROUPS, Attention

STEPS = {"decode": 1, "prefill": 8}
KERNELS = ("flashinfer", "flashinfer-fa3")


def jobs() -> list[tuple[str, str, int]]:
    """Kernel, step and group of every process; groups that need the same kernels once."""
    distinct: dict[tuple, int] = {}
    for index, group in enumerate(GROUPS):
        many = group.num_q_heads // group.num_kv_heads >= 4
        distinct.setdefault((group.dim, group.window is None, many), index)
    return list(itertools.product(KERNELS, STEPS, distinct.values()))


def compile_one(kernel: str, step: str, group: Attention) -> None:
    import torch

    from sglang_jenga.testing.attention_batch import Batch
    from sglang_jenga.testing.attention_kernels import FLASHINFER_WORKSPACE_BYTES, missing, prepare

    if missing(kernel):
        return
    batch = Batch.of([40, 24], [STEPS[step]] * 2, 16)
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    prepare(kernel, batch, group, "cuda", workspace)


def compile_all(folder: Path) -> int:
    """Run all jobs at once, their output in files of ``folder``; how many failed."""
    start = time.monotonic()
    running = []
    for job in jobs():
        words = [str(part) for part in job]
        log = folder / "-".join(words)
        with log.open("w") as file:
            command = [sys.executable, "-m", "benchmarks.gpu.warm", "--one", *words]
            process = subprocess.Popen(command, stdout=file, stderr=file)
        running.append((job, process, log))
    failed = 0
    for (kernel, step, index), process, log in running:
        process.wait()
        label = f"{kernel}, {step}, {GROUPS[index].label}"
        if process.returncode:
            failed += 1
            last = log.read_text().strip().splitlines()[-1:] or ["no message"]
            print(f"{label}: {last[0]}", flush=True)
        else:
            print(f"{label}: ready after {time.monotonic() - start:.0f} s", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("KERNEL", "STEP", "GROUP"), help="only this")
    options = parser.parse_args(argv)
    if options.one:
        kernel, step, index = options.one
        compile_one(kernel, step, GROUPS[int(index)])
        return 0
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        failed = compile_all(Path(folder))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
