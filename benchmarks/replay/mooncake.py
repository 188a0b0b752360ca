"""Requests of a Mooncake trace: lengths, arrivals and shared prefixes of a real chat service.

A line of the trace gives a request's arrival in milliseconds, its lengths, and a `hash_ids` entry
per 512 prompt tokens; equal ids at equal places mean equal tokens. The tokens themselves are not
published, so each id stands for a block of pseudo-random ones, the same wherever the id occurs.
The trace is published in the repository kvcache-ai/Mooncake.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.replay.requests import VOCABULARY, Request, Workload

BLOCK_TOKENS = 512


@dataclass(frozen=True)
class Mooncake:
    """The first `requests` lines of the trace at `path` that pass two filters.

    All prompts share their first block. Those that share the second as well are a family, and one
    family in `one_in` is kept: that leaves the share of reusable tokens as it is and brings a
    prefix's uses closer together, which is what a cache that is `one_in` times smaller needs.
    Requests of more than `longest` tokens, answer included, are left out: `longest` is what the
    smallest compared pool can hold. Lengths are divided by `shorter` (a divisor of 512, so that
    shared blocks stay whole), arrival times by `faster`.
    """

    path: Path
    requests: int
    one_in: int = 1
    shorter: int = 1
    faster: float = 1.0
    longest: int = 1 << 20

    def build(self) -> Workload:
        """Raises ValueError if the trace has too few requests or `shorter` does not divide 512."""
        if BLOCK_TOKENS % self.shorter:
            raise ValueError(f"blocks of {BLOCK_TOKENS} tokens cannot be {self.shorter}x shorter")
        block = BLOCK_TOKENS // self.shorter
        requests: list[Request] = []
        too_long = 0
        with self.path.open() as lines:
            for index, line in enumerate(lines):
                if len(requests) == self.requests:
                    break
                row = json.loads(line)
                family = row["hash_ids"][:2][-1]
                if block_tokens(np.array([family]), 1)[0] % self.one_in:
                    continue
                prompt_tokens = max(1, row["input_length"] // self.shorter)
                output_tokens = max(1, row["output_length"] // self.shorter)
                if prompt_tokens + output_tokens > self.longest:
                    too_long += 1
                    continue
                prompt = block_tokens(np.array(row["hash_ids"]), block)[:prompt_tokens]
                # Negative ids: no prompt of the trace holds them.
                output = block_tokens(np.array([-1 - index]), output_tokens)
                at = row["timestamp"] / 1000 / self.faster
                requests.append(Request(f"mooncake-{index}", prompt, output, at))
        if len(requests) < self.requests:
            raise ValueError(
                f"{self.path.name} has {len(requests)} requests of at most {self.longest} tokens, "
                f"one family in {self.one_in}, not {self.requests}"
            )
        start = min(request.at for request in requests)
        moved = tuple(request._replace(at=request.at - start) for request in requests)
        described = (
            f"Mooncake conversation trace, one family of prompts in {self.one_in}, first "
            f"{self.requests} requests, lengths / {self.shorter}, time / {self.faster:g}, "
            f"{too_long} longer than {self.longest:,} tokens left out"
        )
        return Workload("mooncake", moved, described)


def block_tokens(ids: np.ndarray, tokens: int) -> np.ndarray:
    """Token ids, shape ``[len(ids) * tokens]``, that depend on block id and offset alone."""
    # SplitMix64's finalizer: neighbouring counters come out unrelated. Overflow is meant.
    counters = (ids.astype(np.uint64)[:, None] << np.uint64(32)) + np.arange(
        1, tokens + 1, dtype=np.uint64
    )
    mixed = counters * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(VOCABULARY - 1)).astype(np.int64).reshape(-1) + 1
