"""Token-for-token parity with stock SGLang, over model families and serving options.

    python -m tests.servers.parity                      # the whole matrix
    python -m tests.servers.parity gemma3_text llama    # some families
    python -m tests.servers.parity --jobs 2

The reference of a family is stock SGLang with the same weights, full KV for every layer (SGLang's
CPU attention cannot read hybrid window pools), page size 1 and no pressure. Every cell must give
the same tokens: page size x chunked prefill x overlap x radix cache, and a pool so small that
requests are evicted and retracted.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sglang_jenga.testing.engines import EngineFailed, Run, run_engine
from sglang_jenga.testing.families import EXACT, FAMILY_ARGUMENTS, FULL_KV
from sglang_jenga.testing.pressure import admit_too_many
from sglang_jenga.testing.tiny_models import (
    CPU_FAMILIES,
    STATE_FAMILIES,
    VOCAB_SIZE,
    WINDOW_FAMILIES,
    write_tiny_model,
)

WINDOW = 32
NEW_TOKENS = 12
TOKENS_PER_STATE = 40


class Cell(NamedTuple):
    """One way to serve. ``tokens``: --max-total-tokens, stock's bytes of that many tokens;
    ``states``: --mamba-radix-cache-strategy; ``mixed``: --enable-mixed-chunk."""

    page_size: int = 1
    chunked: bool = False
    overlap: bool = True
    radix: bool = True
    tokens: int = 16384
    states: str | None = None
    mixed: bool = False

    def arguments(self) -> dict[str, Any]:
        strategy = {} if self.states is None else {"mamba_radix_cache_strategy": self.states}
        return strategy | {
            "memory_backend": "jenga",
            "page_size": self.page_size,
            "chunked_prefill_size": 64 if self.chunked else -1,
            "disable_overlap_schedule": not self.overlap,
            "disable_radix_cache": not self.radix,
            "enable_mixed_chunk": self.mixed,
            "max_total_tokens": self.tokens,
        }

    @property
    def label(self) -> str:
        return (
            f"page {self.page_size:2d}  chunked {_on(self.chunked)}  overlap {_on(self.overlap)}"
            f"  radix {_on(self.radix)}  tokens {self.tokens}"
            f"{f'  {self.states}' if self.states else ''}{'  mixed' if self.mixed else ''}"
        )


MATRIX = tuple(
    Cell(page_size, chunked, overlap, radix)
    for page_size, chunked, overlap, radix in itertools.product(
        (1, 16, 64), (False, True), (True, False), (True, False)
    )
)
# Stock's bytes for this many tokens: fewer than half of the prompts' tokens fit at once.
PRESSURE_TOKENS = 640
PRESSURE = tuple(
    Cell(page_size, chunked=True, radix=radix, tokens=PRESSURE_TOKENS)
    for page_size in (1, 16, 64)
    for radix in (True, False)
)


# Families whose states SGLang tracks inside prompts and answers.
TRACKED_FAMILIES = ("qwen3_next", "falcon_h1", "granite_hybrid", "jamba")


def cells_of(family: str, cells: Sequence[Cell] = (*MATRIX, *PRESSURE)) -> list[Cell]:
    """Those that the family can be served in. Without tracking, states are cached at page size 1
    and without overlap; with it, in both of SGLang's ways, everywhere."""
    if family not in STATE_FAMILIES:
        return list(cells)
    served = []
    for cell in cells:
        if not cell.radix:
            served.append(cell)
            continue
        if cell.page_size == 1:
            served.append(cell._replace(overlap=False, states="no_buffer"))
        if family in TRACKED_FAMILIES:
            served += [cell._replace(states=way) for way in ("extra_buffer", "extra_buffer_lazy")]
    return list(dict.fromkeys(served))


def model_of(family: str, folder: Path) -> Path:
    layers = 6 if family in WINDOW_FAMILIES else None if family in STATE_FAMILIES else 3
    return write_tiny_model(family, folder / family, num_layers=layers, window=WINDOW)


def first_wave(seed: int = 0) -> list[list[int]]:
    """32 prompts, 10 to 220 tokens: shared prefixes, branches off the middle, short strangers."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]

    systems = [tokens(count) for count in (24, 70, 110)]
    prompts = [tokens(rng.randrange(10, 30)) for _ in range(4)]
    for index in range(28):
        system = systems[index % 3]
        shared = system[: rng.choice((len(system), len(system), len(system) // 2))]
        prompts.append(shared + tokens(rng.randrange(1, 110)))
    return prompts


def next_wave(prompts: list[list[int]], answers: list[list[int]], seed: int) -> list[list[int]]:
    """The conversations go on, and every other one branches off its middle as well."""
    rng = random.Random(seed)
    wave = []
    for index, (prompt, answer) in enumerate(zip(prompts[:24], answers[:24], strict=True)):
        question = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 30))]
        wave.append(prompt + answer + question)
        if index % 2:
            wave.append(prompt[: 2 * len(prompt) // 3] + question)
    return wave


def reference(family: str, model: Path) -> tuple[list[list[list[int]]], Run]:
    """Waves of prompts, and stock SGLang's answers to them."""
    arguments = {
        "max_total_tokens": 16384,
        **FAMILY_ARGUMENTS.get(family, {}),
        **FULL_KV.get(family, {}),
    }
    first = first_wave()
    arguments |= {"max_new_tokens": NEW_TOKENS, "env": EXACT}
    run = run_engine(
        model, [first, lambda answers: next_wave(first, answers[0], seed=1)], **arguments
    )
    return [first, next_wave(first, run.outputs[0], seed=1)], run


def differing(expected: Run, got: Run) -> int:
    """Number of answers that are not token for token the same."""
    return sum(
        ours != theirs
        for wave, other in zip(expected.outputs, got.outputs, strict=True)
        for ours, theirs in zip(wave, other, strict=True)
    )


def run_cell(family: str, model: Path, waves: list[list[list[int]]], cell: Cell) -> Run:
    # Strict checks turn a leak into a dead engine.
    strict = {
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    }
    arguments = cell.arguments() | FAMILY_ARGUMENTS.get(family, {})
    if family in STATE_FAMILIES:
        arguments["max_mamba_cache_size"] = cell.tokens // TOKENS_PER_STATE
    return run_engine(
        model,
        waves,
        max_new_tokens=NEW_TOKENS,
        env=strict | EXACT,
        prepare=admit_too_many if cell.tokens == PRESSURE_TOKENS else None,
        **arguments,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help=f"default: all of {', '.join(CPU_FAMILIES)}")
    parser.add_argument("--jobs", type=int, default=1, help="engines at a time")
    options = parser.parse_args(argv)
    unknown = set(options.families) - set(CPU_FAMILIES)
    if unknown:
        parser.error(
            f"unknown families {sorted(unknown)}, expected some of {', '.join(CPU_FAMILIES)}"
        )
    failures = cells = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tiny-models-") as folder:
        for family in options.families or CPU_FAMILIES:
            model = model_of(family, Path(folder))
            waves, expected = reference(family, model)
            total = sum(map(len, waves))
            print(f"{family}: {total} prompts", flush=True)

            def one(
                cell: Cell,
                family: str = family,
                model: Path = model,
                waves: Any = waves,
                expected: Run = expected,
            ) -> tuple[Cell, int, str]:
                try:
                    run = run_cell(family, model, waves, cell)
                except EngineFailed as error:
                    return cell, sum(map(len, waves)), f"engine failed: {str(error)[-1500:]}"
                cached = sum(map(sum, run.cached))
                return (
                    cell,
                    differing(expected, run),
                    f"cached {cached}, {run.retractions} retracted",
                )

            with ThreadPoolExecutor(options.jobs) as pool:
                for cell, wrong, remark in pool.map(one, cells_of(family)):
                    cells += 1
                    failures += wrong > 0
                    verdict = "same" if not wrong else f"DIFFERENT: {wrong} of {total}"
                    print(f"  {cell.label}  {verdict}  ({remark})", flush=True)
    took = (time.monotonic() - started) / 60
    print(f"{cells - failures} of {cells} cells identical to stock SGLang, {took:.1f} minutes")
    return 1 if failures else 0


def _on(value: bool) -> str:
    return "on " if value else "off"


if __name__ == "__main__":
    sys.exit(main())
