"""Stock SGLang serving a tiny model with states: two waves of prompts, the second from the first.

Without arguments: states are cached where requests end, at page size 1 and without overlap, which
stock does for every such model. Page sizes and overlap need snapshots or no prefix cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.families import EXACT, STOCK_STATES
from tests.servers.parity import first_wave, next_wave


def serve(model: Path, **arguments: Any) -> Run:
    """24 answer tokens each, so that some answers cross a tracking interval of 64 tokens."""
    first = first_wave()
    return run_engine(
        model,
        [first, lambda answers: next_wave(first, answers[0], seed=1)],
        max_new_tokens=24,
        env=EXACT,
        max_total_tokens=16384,
        **(STOCK_STATES | arguments),
    )
