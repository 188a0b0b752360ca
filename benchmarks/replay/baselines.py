"""What is compared: ways to give the same bytes to a model's layer groups.

A baseline is server arguments, environment variables, a plan of the pool, and whether stock's
settings are swept for the best. Stock runs as it would on a GPU: nothing is forwarded, so what
SGLang would refuse for want of CPU kernels can be had here as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from benchmarks.replay.geometries import Geometry
from sglang_jenga.boot import chunks
from sglang_jenga.serving.ablation import ENV, CacheOptions

# How states get into the prefix cache. SGLang's default tracks them at intervals, in two extra
# slots of each running request, or in one if the other is taken only when needed; without any,
# they are cached where chunks and requests end, and nothing overlaps.
TRACKED = {"mamba_radix_cache_strategy": "extra_buffer"}
LAZY = {"mamba_radix_cache_strategy": "extra_buffer_lazy"}
UNTRACKED = {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True}

CHUNK = 8192
"""SGLang's --chunked-prefill-size on a GPU of 80 GB."""
Settings = tuple[dict[str, Any], ...]

SWEEPS: dict[str, Settings] = {
    "swa_full_tokens_ratio": tuple(
        {"swa_full_tokens_ratio": ratio} for ratio in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    ),
    "mamba_full_memory_ratio": (
        TRACKED,
        *(
            strategy | {"mamba_full_memory_ratio": ratio}
            for strategy, ratio in product((LAZY, UNTRACKED), (0.3, 0.9, 3.0, 9.0))
        ),
    ),
}
"""Server arguments that stock is tried with, by the flag that cuts its pool."""


@dataclass(frozen=True)
class Baseline:
    """`states`: further arguments for models with states. Stock is told SGLang's default, which it
    gets on a GPU only; jenga finds its own. `missing`: why nobody can have it."""

    name: str
    described: str
    arguments: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=lambda: dict(TRACKED))
    plan: str = "lcm"
    sweeps: bool = False
    missing: str | None = None

    @property
    def _is_jenga(self) -> bool:
        return self.arguments.get("memory_backend") == "jenga"

    def settings(self, geometry: Geometry) -> Settings:
        """Server arguments to try one after another; empty if there is nothing to choose."""
        if not self.sweeps or geometry.ratio is None:
            return ()
        if self._is_jenga:  # it has no ratio
            return (TRACKED, LAZY, UNTRACKED) if geometry.has_states else ()
        return SWEEPS[geometry.ratio]

    def missing_on(self, geometry: Geometry) -> str | None:
        """Why this baseline cannot be had for `geometry`, or None."""
        if self.missing:
            return self.missing
        if "enable_unified_memory" in self.arguments and geometry.ratio is None:
            return "--enable-unified-memory is refused: stock stores this model in one pool"
        return None

    def server(self, geometry: Geometry, chunk: int = CHUNK) -> dict[str, Any]:
        """All server arguments on this geometry; the baseline's win over it.

        `chunk`: what --chunked-prefill-size should be; it must hold whole pages. jenga is not told
        SGLang's own one for this GPU where it chooses another (`sglang_jenga.boot.chunks`).
        """
        arguments = geometry.server | {"chunked_prefill_size": chunk}
        if chunk == CHUNK and self.plan == "lcm" and self._is_jenga and geometry.has_mixed_chunks:
            del arguments["chunked_prefill_size"]
        if geometry.has_states:
            arguments |= self.states
            if self.plan == "max":
                arguments |= _pages_like_states(geometry, chunk)
        return arguments | self.arguments


def _pages_like_states(geometry: Geometry, chunk: int) -> dict[str, Any]:
    """Pages with so many tokens' KV that a state fits in one, as vLLM enlarges its blocks."""
    full, state = geometry.replayed
    page_size = -(-state.entry_bytes // (64 * full.entry_bytes)) * 64
    return {
        "page_size": page_size,
        "mamba_track_interval": page_size,
        "chunked_prefill_size": max(1, chunk // page_size) * page_size,
    }


_JENGA = {"memory_backend": "jenga"}
_MIXED = {"enable_mixed_chunk": True, "chunked_prefill_size": chunks.CHUNK}
_AUTO: dict[str, Any] = {}
_UNIFIED = {"enable_unified_memory": True, "attention_backend": "triton"}

_ALL = (
    Baseline("stock", "SGLang as it comes, default ratios"),
    Baseline(
        "stock-best",
        "SGLang with the ratio (and caching of states) that models the most tokens per second in a "
        "sweep; the same as stock where it has no ratio",
        sweeps=True,
    ),
    Baseline("stock-mixed", "stock with decode steps in chunks of 2,048 tokens", _MIXED),
    *(
        Baseline(
            f"{name}-{order}",
            f"{name} with the queue in the order of --schedule-policy {order}",
            arguments | {"schedule_policy": order},
            states=states,
        )
        for order in ("lpm", "hrrn")
        for name, arguments, states in (("stock", {}, TRACKED), ("jenga", _JENGA, _AUTO))
    ),
    Baseline(
        "stock-untracked",
        "stock with states cached only where chunks and requests end",
        states=UNTRACKED,
    ),
    Baseline(
        "max-page",
        "jenga's pool with one page size for all groups, the largest; with states, pages of KV are "
        "made as large as a state",
        _JENGA,
        states=_AUTO,
        plan="max",
    ),
    Baseline(
        "gcd-page",
        "pages of the greatest common divisor, several per entry",
        missing="an entry of several pages has no single address, so neither our allocator nor "
        "SGLang's kernels can express it; it would waste and pad nothing, and jenga is off that "
        "bound by its wasted and padded shares",
    ),
    Baseline(
        "unified",
        "SGLang's unified memory pool",
        _UNIFIED,
    ),
    Baseline(
        "unified-best",
        "SGLang's unified memory pool, its settings swept as stock-best's are",
        _UNIFIED,
        sweeps=True,
    ),
    Baseline("jenga", "this project as it comes", _JENGA, states=_AUTO),
    Baseline(
        "jenga-unmixed",
        "jenga with prompts in steps of their own, in stock's chunks",
        _JENGA | {"chunked_prefill_size": CHUNK},
        states=_AUTO,
    ),
    Baseline(
        "jenga-best",
        "jenga with the caching of states that models the most tokens per second; the same as "
        "jenga without states",
        _JENGA,
        sweeps=True,
    ),
    Baseline(
        "jenga-untracked",
        "jenga with states cached only where chunks and requests end",
        _JENGA,
        states=UNTRACKED,
    ),
    *(
        Baseline(
            f"jenga-no-{part.replace('_', '-')}",
            f"without {part} (see ablation.py)",
            _JENGA,
            {ENV: part},
            _AUTO,
        )
        for part in CacheOptions._fields
    ),
)
BASELINES: dict[str, Baseline] = {baseline.name: baseline for baseline in _ALL}
