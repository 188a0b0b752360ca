"""What is compared: ways to give the same bytes to a model's layer groups.

A baseline is server arguments, environment variables, a plan of the pool, and whether stock's fixed
ratio is swept. It does not know the workload.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.replay.geometries import Geometry
from sglang_jenga.ablation import ENV, Policy

SWEEPS: dict[str, tuple[float, ...]] = {
    "swa_full_tokens_ratio": (0.05, 0.1, 0.2, 0.4, 0.6, 0.8),
    "mamba_full_memory_ratio": (0.1, 0.3, 0.6, 0.9, 1.5, 3.0),
}


@dataclass(frozen=True)
class Baseline:
    name: str
    described: str
    arguments: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    plan: str = "lcm"
    sweeps: bool = False
    missing: str | None = None

    def missing_on(self, geometry: Geometry) -> str | None:
        """Why this baseline cannot be had for `geometry`, or None."""
        if self.missing or geometry.missing:
            return self.missing or geometry.missing
        states = geometry.real.groups[-1].layer_type == "state"
        if self.plan == "max" and states:
            return (
                "a page of a state's size holds thousands of tokens' KV, and states are cached at "
                "one token per page"
            )
        return None


_JENGA = {"memory_backend": "jenga"}

_ALL = (
    Baseline("stock", "SGLang as it comes, default ratios"),
    Baseline(
        "stock-best",
        "SGLang with the ratio of the pool that models the most tokens per second in a sweep; "
        "stock where there is no ratio",
        sweeps=True,
    ),
    Baseline(
        "max-page",
        "our pool with one page size for all groups, the largest",
        _JENGA,
        plan="max",
    ),
    Baseline(
        "gcd-page",
        "pages of the greatest common divisor, several per entry",
        missing="an entry of several pages has no single address, so neither our allocator nor "
        "SGLang's kernels can express it; it would hold what the byte bound says",
    ),
    Baseline(
        "unified",
        "SGLang's unified memory pool",
        {"enable_unified_memory": True, "attention_backend": "triton"},
        {"TRITON_INTERPRET": "1"},
    ),
    Baseline("jenga", "this project", _JENGA),
    *(
        Baseline(
            f"jenga-no-{part.replace('_', '-')}",
            f"without {part} (see ablation.py)",
            _JENGA,
            {ENV: part},
        )
        for part in Policy._fields
    ),
)
BASELINES: dict[str, Baseline] = {baseline.name: baseline for baseline in _ALL}
