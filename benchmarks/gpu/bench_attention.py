"""Paged attention over three layouts of the KV pool: what do strided views cost on a GPU?

    python -m benchmarks.gpu.bench_attention                 # every cell
    python -m benchmarks.gpu.bench_attention --minutes 4     # the most telling cells first
    python -m benchmarks.gpu.bench_attention --only triton --markdown table.md --json rows.json

Cells: layer groups of real models x page size x batch and context x decode or prefill, on
SGLang's Triton kernels, FlashInfer (its own kernels and those for Hopper) and, where the machine
has it, SGLang's FlashAttention 3. In each cell the same K and V lie in the pool contiguous,
token-major and page-layer (attention_layouts.py), and the kernel attends over one layer of each in
turns. Times are medians; GB/s counts K and V once; ratios are to contiguous, below 1 is slower;
error is the largest difference from float64.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.timing import Column, Deadline, Report, machine, median_seconds, require_cuda
from sglang_jenga.testing.attention_batch import Batch, error, fill
from sglang_jenga.testing.attention_kernels import (
    FLASHINFER_WORKSPACE_BYTES,
    KERNELS,
    missing,
    prepare,
)
from sglang_jenga.testing.attention_layouts import (
    GROUPS,
    LAYOUTS,
    Attention,
    PagedKV,
    buffer_elements,
    layer_pages,
)

PAGE_SIZES = (16, 1, 64)
# Requests and tokens of each; the first ones are what a busy server's step looks like.
DECODES = ((32, 4096), (8, 16384), (1, 65536), (256, 1024), (1, 1024))
# New tokens of each request behind its context.
PREFILLS = ((1, 8192, 2048), (4, 2048, 2048), (1, 65536, 2048), (16, 1024, 128))
ERROR_LIMIT = 2e-2
"""What rounding weights and output to bfloat16 explains; the values are of order 1."""
EXPECTED_RATIO = 0.98
"""Of stock's layout's speed on ours; a cell below it gets a note."""
RESERVED_BYTES = 14 << 30
"""For the float64 reference over the longest context, random numbers on their way, workspaces."""
COLUMNS = (
    Column("kernel", "kernel", width=10),
    Column("group", "layers", width=24),
    Column("page_size", "page"),
    Column("step", "step", width=24),
    Column("contiguous", "contiguous, us", "{:.1f}"),
    Column("gbps", "GB/s", "{:.0f}"),
    Column("token-major", "token-major, us", "{:.1f}"),
    Column("token-major ratio", "ratio", "**{:.2f}**"),
    Column("page-layer", "page-layer, us", "{:.1f}"),
    Column("page-layer ratio", "ratio", "**{:.2f}**"),
    Column("error", "error", "{:.0e}"),
)


class Cell(NamedTuple):
    group: Attention
    page_size: int
    num_requests: int
    context: int  # tokens, those of the step included
    num_new: int  # queries per request; 1 is decode

    @property
    def step(self) -> str:
        kind = "decode" if self.num_new == 1 else f"prefill {self.num_new}"
        return f"{kind}, {self.num_requests} x {self.context}"

    def batch(self) -> Batch:
        # Lengths differ a little, as they do in a server: no two requests end together.
        lengths = [
            max(self.num_new, self.context - 7 * index % 64) for index in range(self.num_requests)
        ]
        return Batch.of(lengths, [self.num_new] * self.num_requests, self.page_size)


def cells() -> Iterator[Cell]:
    """The most telling first: a run that is cut off has a bit of everything."""
    steps = [(*decode, 1) for decode in DECODES]
    mixed = itertools.chain.from_iterable(itertools.zip_longest(steps, PREFILLS))
    for step, page_size in itertools.product(filter(None, mixed), PAGE_SIZES):
        for group in GROUPS:
            yield Cell(group, page_size, *step)


def lay_out(cell: Cell, buffer: torch.Tensor) -> dict[str, PagedKV] | None:
    """One layer in each layout, or None if the buffer is too short.

    Contiguous lies in front. The other two share the bytes behind it, so each must be filled
    again before its answer is looked at; how long a kernel takes does not depend on what it reads.
    """
    group, page_size, num_pages = cell.group, cell.page_size, cell.batch().num_pages
    sizes = {name: buffer_elements(name, group, num_pages, page_size) for name in LAYOUTS}
    dense = sizes["contiguous"]
    if dense + max(sizes.values()) > buffer.numel():
        return None
    return {
        name: layer_pages(
            name,
            buffer if name == "contiguous" else buffer[dense:],
            group,
            group.num_layers // 2,
            num_pages,
            page_size,
        )
        for name in LAYOUTS
    }


def measure(
    kernel: str, cell: Cell, views: dict[str, PagedKV], workspace: torch.Tensor
) -> dict[str, Any]:
    """A row of the report."""
    batch, group = cell.batch(), cell.group
    attend = prepare(kernel, batch, group, "cuda", workspace)
    shape = (int(batch.q_lens.sum()), group.num_q_heads, group.dim)
    generator = torch.Generator("cuda").manual_seed(1)
    q = torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)
    errors = []
    for view in views.values():
        fill(view)
        errors.append(error(attend(q, view), q, view, batch, group.window))
    seconds = median_seconds([partial(attend, q, view) for view in views.values()])
    times = dict(zip(views, seconds, strict=True))
    return {
        "kernel": kernel,
        "group": group.label,
        "page_size": cell.page_size,
        "step": cell.step,
        "gbps": batch.bytes_read(group, 2) / times["contiguous"] / 1e9,
        "error": math.nan if any(map(math.isnan, errors)) else max(errors),
        **{layout: 1e6 * time for layout, time in times.items()},
        **{f"{layout} ratio": times["contiguous"] / times[layout] for layout in LAYOUTS[1:]},
    }


def run(kernels: list[str], deadline: Deadline, report: Report) -> bool:
    """Whether every kernel ran, and was right, in every cell that was tried."""
    free, _ = torch.cuda.mem_get_info()
    buffer = torch.empty((free - RESERVED_BYTES) // 2, dtype=torch.bfloat16, device="cuda")
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    good = True
    todo = list(cells())
    for done, cell in enumerate(todo):
        if deadline.passed():
            report.note(f"time was up after {done} of {len(todo)} cells")
            break
        where = f"{cell.group.label}, page {cell.page_size}, {cell.step}"
        views = lay_out(cell, buffer)
        if views is None:
            report.note(f"{where}: does not fit in {buffer.nbytes / 2**30:.0f} GiB")
            continue
        for kernel in kernels:
            try:
                row = measure(kernel, cell, views, workspace)
                torch.cuda.synchronize()
            except (RuntimeError, ValueError) as cause:  # what the three raise for what they lack
                report.note(f"{kernel}, {where}: {str(cause).splitlines()[0]}")
                good = False
                continue
            report.add(**row)
            if row["token-major ratio"] < EXPECTED_RATIO:
                report.note(
                    f"{kernel}, {where}: {row['token-major ratio']:.2f} of contiguous, "
                    f"{EXPECTED_RATIO} was expected"
                )
            if not row["error"] < ERROR_LIMIT:
                report.note(f"{kernel}, {where}: wrong, by {row['error']}")
                good = False
    return good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="start no cell after that")
    parser.add_argument("--only", choices=KERNELS, action="append", help="may be repeated")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    options = parser.parse_args(argv)
    require_cuda()
    command = " ".join(["python -m benchmarks.gpu.bench_attention", *(argv or sys.argv[1:])])
    report = Report(
        "attention",
        COLUMNS,
        command,
        machine(),
        json_path=options.json,
        markdown_path=options.markdown,
    )
    kernels = []
    for kernel in options.only or KERNELS:
        reason = missing(kernel)
        if reason:
            report.note(f"{kernel} {reason}")
        else:
            kernels.append(kernel)
    good = run(kernels, Deadline(options.minutes), report)
    return 0 if good and report.rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
