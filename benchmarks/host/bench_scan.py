"""Mamba-1's prefill on a CPU: SGLang's loop over tokens, one sequence after another, against ours,
which has all sequences side by side and loops for one multiplication and one addition alone.

    python -m benchmarks.host.bench_scan

Processor seconds of one thread, the least of five. Says nothing about a GPU, where the loop costs a
dozen launches a token and ours one launch a layer.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # before SGLang is imported

import torch
from torch.nn.functional import silu, softplus

from sglang_jenga.kernels.selective_scan import selective_scan_reference

# Channels, numbers of a state, tokens of each sequence: the tiny model's, and Jamba-1.5-mini's.
CASES = (
    (128, 16, (200,)),
    (128, 16, (64,) * 8),
    (8192, 16, (256,)),
    (8192, 16, (64,) * 4),
)


def loop() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """SGLang's, whose module a CPU can import with the operators of the CPU engine only."""
    from sglang_jenga.boot import hook_table, rebinding

    rebinding.rebind(hook_table.CPU_SCHEDULER)
    from sglang.srt.layers.attention.mamba.mamba1 import MambaMixer1

    return MambaMixer1._selective_scan


def least(function: Callable[[], None]) -> float:
    seconds = []
    for _ in range(5):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def row(scan: Callable, dim: int, numbers: int, lengths: tuple[int, ...]) -> str:
    torch.manual_seed(0)
    tokens, count = sum(lengths), len(lengths)
    x, dt, gate = (torch.randn(tokens, dim) for _ in range(3))
    b, c = torch.randn(tokens, numbers), torch.randn(tokens, numbers)
    a, d = -torch.rand(dim, numbers), torch.randn(dim)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    states, slots = torch.zeros(count, dim, numbers), torch.arange(count)
    fresh = torch.zeros(count, dtype=torch.bool)
    out, want = torch.empty(tokens, dim), torch.empty(tokens, dim)

    def theirs() -> None:
        for begin, end in itertools.pairwise(starts.tolist()):
            part = slice(begin, end)
            steps = softplus(dt[part])
            _, y = scan(x=x[part], dt=steps, A=a, B=b[part], C=c[part], h0=torch.zeros_like(a))
            want[part] = (y + x[part] * d) * silu(gate[part])

    def ours() -> None:
        selective_scan_reference(x, dt, gate, a, b, c, d, states, slots, starts, fresh, out)

    loop_seconds, our_seconds = least(theirs), least(ours)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)
    return (
        f"{dim:8} {f'{count} x {lengths[0]}':>9} {1e3 * loop_seconds:8.1f} "
        f"{1e3 * our_seconds:8.1f} {loop_seconds / our_seconds:5.1f}x"
    )


def main() -> int:
    torch.set_num_threads(1)
    scan = loop()
    print(f"{'channels':>8} {'tokens':>9} {'loop ms':>8} {'ours ms':>8} {'ratio':>6}")
    for case in CASES:
        print(row(scan, *case), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
