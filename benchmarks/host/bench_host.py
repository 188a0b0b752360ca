"""Time that memory takes on the scheduler's thread: jenga against SGLang's allocators and tree.

    python -m benchmarks.host.bench_host  # everything, half an hour
    python -m benchmarks.host.bench_host --model synthetic --batch 64 --pool 10000
    python -m benchmarks.host.bench_host --model gemma-3-27b --batch 64     # two or three minutes
    python -m benchmarks.host.bench_host --profile jenga --batch 256 --pool 100000

Two instruments. *Synthetic* layers: SGLang's own `ScheduleBatch`, `Req` and allocation functions
(under jenga with the plugin's hooks around them) in one process on CPU tensors; all sides get the
same calls in turn (`host_side.py`). `--batch` requests decode at a time. First in an empty pool;
then on and on, each one that ends followed by the next, in a pool that cached prefixes fill, so
that every page must be evicted first.

    check    whether the next decode step fits, evicting if it does not
    slide    giving up what windows have left behind
    alloc    the step's slots, into the request rows
    match    longest cached prefix of a waiting request
    lock     of that prefix
    extend   allocation for its prompt, eviction and the indices of the hit included
    insert   offering the prompt's pages to the tree
    release  offering the answer's, giving back the rest

A real *model's* layers, with its window and its cut of the pool: SGLang's whole scheduler, in the
same two states and in a third, where others wait in every step (`host_queue.py`). There a step is

    round    SGLang's admission, which finds nobody who fits: order of the queue, prefixes that it
             refreshes, look-up of the first one, budget
    check    as above
    prepare  the step's slots and rows, what windows give up, where states are tracked

and `admit` is a request's share of a round that did find room, its slots and tensors included.
What a GPU adds to every side (copies to the device, kernel launches) is in neither.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from benchmarks.host import tables
from benchmarks.host.cache_sides import Shape
from benchmarks.host.full_queue import MODELS, QueueCell, play_cell
from benchmarks.host.full_queue import SIDES as ENGINE_SIDES
from benchmarks.host.side import Chat, HostSide
from benchmarks.host.tables import table
from benchmarks.replay.engine import ReplayFailed
from benchmarks.replay.steady import Crowd
from sglang_jenga.testing.context import configured

BATCHES = (8, 64, 256)
POOLS = (10_000, 100_000, 1_000_000)
LEAST_REQUEST = 64  # tokens; cells whose requests would be shorter are left out
MOST_AT_ONCE = 8  # prompts of one prefill batch
WARM_STEPS = 16
SIDES = ("unified", "unified-memory", "jenga")
SYNTHETIC = "synthetic"
QUEUE_BATCHES = (64, 256)
Found = dict[str, dict[str, dict[str, list[float]]]]
"""Seconds by cell, side and call."""


class Cell(NamedTuple):
    """`pool`: small pages of a group, which are tokens times `page_size`."""

    windows: bool
    batch: int
    pool: int
    page_size: int = 1

    @property
    def request(self) -> int:
        """Tokens of a running request; together they fill half of the pool at most."""
        return min(2048, self.pool * self.page_size // 2 // self.batch)

    @property
    def answer(self) -> int:
        return min(64, self.request // 4)

    @property
    def window(self) -> int | None:
        """A quarter of a request, so that all of them outgrow it."""
        return max(16, self.request // 4) if self.windows else None

    @property
    def shape(self) -> Shape:
        tokens = self.pool * self.page_size
        return Shape(tokens, self.page_size, self.window, self.batch, self.request + 64)

    @property
    def sides(self) -> tuple[str, ...]:
        """Unified memory is for models with windows (or states) only."""
        return SIDES if self.windows else SIDES[::2]

    @property
    def label(self) -> list[str]:
        layers = f"full + window {self.window}" if self.windows else "full"
        return [layers, str(self.batch), f"{self.pool:,}", f"{self.request:,}"]


def chats(cell: Cell, rng: random.Random) -> Iterator[Chat]:
    """Without end: a few shared system prompts; every second prompt goes on from half of an earlier
    one. All of one length, but for their last tenth."""

    def fresh(count: int) -> list[int]:
        return [rng.randrange(1 << 20) for _ in range(count)]

    longest = cell.request - cell.answer
    systems = [fresh(longest // 4) for _ in range(4)]
    recent: list[list[int]] = []
    while True:
        length = longest - rng.randrange(max(1, longest // 10))
        goes_on = recent and rng.random() < 0.5
        head = rng.choice(recent)[: longest // 2] if goes_on else rng.choice(systems)
        prompt = head + fresh(length - len(head))
        recent = [*recent[-cell.batch :], prompt]
        yield Chat(prompt, fresh(cell.answer))


def run_cell(
    cell: Cell, steps: int, names: Sequence[str], profiler: cProfile.Profile | None = None
) -> list[HostSide]:
    """Play a cell on all sides at once, call by call in turn; they have the times.

    `profiler`: enabled for the steps that are timed in a full pool.
    """
    sides = [HostSide(name, cell.shape) for name in names]
    rng = random.Random(0)
    stream = chats(cell, rng)

    def each(act: Callable[[HostSide], object]) -> None:
        # In any order, so that no side always finds the processor's caches warmed by another.
        for side in rng.sample(sides, len(sides)):
            act(side)

    def admit(count: int) -> None:
        for begin in range(0, count, MOST_AT_ONCE):
            group = list(islice(stream, min(MOST_AT_ONCE, count - begin)))
            each(lambda side, group=group: side.admit(group))

    def phase(name: str | None) -> None:
        for side in sides:
            side.phase = name

    gc.collect()
    gc.disable()
    admit(cell.batch)
    each(HostSide.decode)
    phase("spare")
    for _ in range(cell.answer - 2):
        each(HostSide.decode)
    phase(None)
    each(HostSide.release_all)
    for _ in range(-(-2 * cell.shape.num_tokens // cell.request)):  # half of a prompt is new
        admit(1)
        each(HostSide.release_all)
    # Answers of every length, so that a few requests end in every step and not all in one.
    for chat in islice(stream, cell.batch):
        chat = Chat(chat.prompt, chat.answer[: rng.randint(2, cell.answer)])
        each(lambda side, chat=chat: side.admit([chat]))
    for at in range(WARM_STEPS + steps):
        if at == WARM_STEPS:
            phase("full")
            if profiler is not None:
                profiler.enable()
        each(HostSide.decode)
        ended = {side.release_ended() for side in rng.sample(sides, len(sides))}
        assert len(ended) == 1, "the sides do not play the same"
        admit(ended.pop())
    if profiler is not None:
        profiler.disable()
    gc.enable()
    return sides


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    for windows in (False, True):
        for batch in options.batch or BATCHES:
            for pool in options.pool or POOLS:
                cell = Cell(windows, batch, pool, options.page_size)
                if cell.request >= LEAST_REQUEST:
                    yield cell


# ---- report ---------------------------------------------------------------------------------


def profile(cell: Cell, steps: int, name: str) -> None:
    """Play the cell on one side; print where the own time of memory's functions went, and their
    callees' included."""
    profiler = cProfile.Profile()
    run_cell(cell, steps, [name], profiler)
    stats = pstats.Stats(profiler)
    for order in ("tottime", "cumtime"):
        stats.sort_stats(order).print_stats("sglang_jenga|mem_cache|radix", 20)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[SYNTHETIC, *MODELS], action="append", help="only this")
    parser.add_argument("--batch", type=int, action="append", metavar="N", help="only this one")
    parser.add_argument(
        "--pool",
        type=int,
        action="append",
        metavar="N",
        help="only this one, and synthetic layers only: a model's pool follows from its batch",
    )
    parser.add_argument("--page-size", type=int, default=1, metavar="N", help="tokens per page")
    parser.add_argument("--steps", type=int, default=192, metavar="N", help="timed in a full pool")
    parser.add_argument(
        "--profile", choices=SIDES, help="play synthetic layers on one side, under cProfile"
    )
    parser.add_argument("--json", type=Path, help="write all times, in seconds, to this file")
    options = parser.parse_args(argv)
    chosen = options.model or [SYNTHETIC, *MODELS]
    if options.pool or options.profile:
        chosen = [name for name in chosen if name == SYNTHETIC]
        if not chosen:
            parser.error("--pool and --profile are for synthetic layers only")
    found: Found = {}
    # First: its engines are forked, which a process with SGLang's context in it should not be.
    failed = play_models(options, [name for name in chosen if name != SYNTHETIC], found)
    if SYNTHETIC in chosen:
        play_synthetic(options, found)
    if options.json:
        options.json.write_text(json.dumps(found) + "\n")
    for label, why in failed.items():
        print(f"{label} failed: {why}", file=sys.stderr)
    return 1 if failed else 0


def play_synthetic(options: argparse.Namespace, found: Found) -> None:
    """Print the cells' tables, and add their times to `found`."""
    step_rows, request_rows = [], []
    with configured():
        for cell in cells(options):
            label = " | ".join(cell.label)
            print(label, file=sys.stderr, flush=True)
            if options.profile is not None:
                if options.profile in cell.sides:
                    profile(cell, options.steps, options.profile)
                continue
            sides = run_cell(cell, options.steps, cell.sides)
            step_rows.append([*cell.label, *tables.step_row(sides)])
            request_rows.append([*cell.label, *tables.request_row(sides)])
            found[label] = {
                side.name: {"/".join(key): times for key, times in side.seconds.items()}
                for side in sides
            }
    if step_rows:
        print(f"microseconds, {' / '.join(SIDES)}, **jenga / unified**\n")
        print(table((*tables.CELL_HEAD, *tables.STEP_HEAD), step_rows), end="\n\n")
        print(table((*tables.CELL_HEAD, *tables.REQUEST_CALLS), request_rows), end="\n\n")


def play_models(
    options: argparse.Namespace, models: Sequence[str], found: Found
) -> dict[str, Exception]:
    """The same for models; return the cells that failed, and why."""
    step_rows, request_rows = [], []
    failed: dict[str, Exception] = {}
    for model in models:
        for batch in options.batch or QUEUE_BATCHES:
            cell = QueueCell(model, Crowd(batch), options.page_size)
            label = " | ".join(cell.label)
            print(label, file=sys.stderr, flush=True)
            try:
                seen = play_cell(cell, options.steps)
            except (ReplayFailed, ValueError) as error:
                failed[label] = error
                continue
            step_rows.append([*cell.label, *tables.queue_step_row(seen)])
            request_rows.append([*cell.label, *tables.queue_request_row(seen)])
            found[label] = {
                name: {
                    f"{state}/{call}": seconds
                    for state, kept in side.states.items()
                    for call, seconds in kept.seconds.items()
                }
                for name, side in seen.items()
            }
    if step_rows:
        print(f"microseconds, {' / '.join(ENGINE_SIDES)}, **jenga / stock**\n")
        heads = (tables.QUEUE_STEP_HEAD, tables.QUEUE_REQUEST_HEAD)
        for head, rows in zip(heads, (step_rows, request_rows), strict=True):
            print(table((*tables.MODEL_HEAD, *head), rows), end="\n\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
