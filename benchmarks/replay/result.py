"""What one replay found, as plain numbers that go to JSON and back.

Measured, exact on any machine: everything in `Steps` but the time, the token counts of `Served`,
and the totals that are not named below. Modelled by the clock (`clock.py`) and nothing else:
`Steps.time`, the three moments of `Served`, and the totals ``modelled_*``, ``ttft_*``, ``itl_*``.
Measured, but this machine's own: the totals ``host_*``. ``host_seconds`` is what the whole replay
took; ``host_ms_*`` is CPU time that the scheduler's thread spends on one step in SGLang's code and
the plugin's, without the replay's own (arrivals, clock, null model, records, outputs). A server's
step takes the longer of this and its GPU's time, and the modelled times know nothing of it.

Every byte of the pool is in one of three places, the same for every baseline:

    held     small pages, slots or states that running requests hold; a shared one counts once
    cached   only the prefix cache holds it, or a running request has left it behind its window, or
             is tracked there, and gives it back when asked; it can be evicted, and a hit may still
             use it
    empty    the rest: free, or lost to rounding when the pool was cut

and the two kinds of waste are counted in them, from the requests' own lengths:

    needed   what the step's attention reads of a running request: every token of text in full
             layers, the image's in cross-attention layers, the last `window` of each computed one
             in window layers, one state; with overlap also what
             the step before read, for it is still under way when this one's memory is allocated. A
             token that several requests read counts once, at its unpadded size
    wasted   held - needed, and the part of the empty bytes that nobody can take: however far the
             running requests' mix of layer groups goes on being served, some partition (or group
             with half-filled large pages) runs out first, and what the others have left is stranded
    padded   the part of held and cached that is padding of entries, and what rounding cut off

``evicted_tokens`` counts tokens whose full-attention KV left the prefix cache. ``ttft_*`` are
percentiles over requests; so are ``itl_*``, of each request's mean gap between its tokens.
``wasted_share`` and ``padded_share`` are means over the time in which requests waited; without any
such time, over all steps. Cached bytes are never called waste: a hit may want them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Steps(NamedTuple):
    """One entry per step that was kept. `time`: modelled seconds at the end of the step; bytes are
    those of the replayed pool, by layer group where they have names."""

    time: list[float]
    running: list[int]
    waiting: list[int]
    held: dict[str, list[int]]
    cached: dict[str, list[int]]
    empty: list[int]
    wasted: list[int]


class Served(NamedTuple):
    """One request. Tokens are measured; the moments are modelled seconds."""

    rid: str
    prompt_tokens: int
    output_tokens: int
    hit_tokens: int
    """Of its first admission."""
    recomputed_tokens: int
    """Computed again because a retraction had thrown them away."""
    retractions: int
    arrived: float
    first_token: float
    finished: float


class Result(NamedTuple):
    steps: Steps
    requests: list[Served]
    totals: dict[str, float]
    config: dict[str, Any]


def to_json(result: Result) -> dict[str, Any]:
    """Plain dicts and lists; `from_json` gives the same result back."""
    return {
        "steps": result.steps._asdict(),
        "requests": [list(served) for served in result.requests],
        "totals": result.totals,
        "config": result.config,
    }


def from_json(stored: Mapping[str, Any]) -> Result:
    return Result(
        Steps(**stored["steps"]),
        [Served(*row) for row in stored["requests"]],
        dict(stored["totals"]),
        dict(stored["config"]),
    )
