"""Which cells a table has, and how large its workloads are.

    ci      two models, one small workload: minutes, for a test that the whole instrument works
    quick   `make bench`: under half an hour on two cores
    full    what benchmarks/results/replay.md reports; hours

Models run on GPUs that hold them, so pools have a real size. Workloads are the same for all models
but those that see images, which have loads of their own. They are large enough that requests wait
for memory; where the GPUs would hold them all at once, which stock does not need help with, the
pool is limited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.replay.cells import Deployment, Limits
from benchmarks.replay.crowds import Bursts, CodingAgents, Passages, Tenants
from benchmarks.replay.mooncake import Mooncake
from benchmarks.replay.pictures import Pictures
from benchmarks.replay.requests import Load
from benchmarks.replay.workloads import (
    Chats,
    Documents,
    Exams,
    Phase,
    SharedPrefixes,
    agents,
    reasoning,
    shift,
)

DENSE = ("llama-3.1-8b",)
"""The control: one kind of layer, nothing to gain."""

DEPLOYMENTS = {
    "gemma-3-27b": Deployment("h100", 2),
    "gemma-2-9b": Deployment("h100"),
    "gpt-oss-20b": Deployment("l4"),
    "qwen3-next-80b": Deployment("h100", 2, pool_gib=10),
    "falcon-h1-7b": Deployment("h100", pool_gib=12),
    "llama-3.1-8b": Deployment("h100"),
    "ministral-8b": Deployment("h100"),
    "nemotron-h-8b": Deployment("l4"),
    "jamba-1.5-mini": Deployment("h100", 2, pool_gib=6),
    "llama-3.2-11b-vision": Deployment("h100"),
}
MODELS = tuple(DEPLOYMENTS)


class Profile(NamedTuple):
    """`workloads` are built when their turn comes; `trace` is what is taken of the trace."""

    models: tuple[str, ...]
    workloads: Mapping[str, Load]
    baselines: tuple[str, ...]
    limits: Limits
    trace: Callable[[Path], Mooncake] | None


PROFILES = {
    "ci": Profile(
        ("gemma-3-27b", "llama-3.1-8b"),
        {"shift": shift(Phase(32, (128, 512), (32, 96)), Phase(48, (4000, 8000), (64, 192)), 1)},
        ("stock", "jenga"),
        Limits(),
        None,
    ),
    "quick": Profile(
        ("gemma-3-27b", "gpt-oss-20b", "qwen3-next-80b", "llama-3.1-8b"),
        {
            "multi-turn": Chats(clients=16, rounds=8),
            "shared-prefixes": SharedPrefixes(groups=32),
            "shift": shift(repeat=1),
            "reasoning": reasoning(Phase(64, (256, 1024), (1024, 5120))),
        },
        ("stock", "max-page", "jenga"),
        Limits(),
        None,
    ),
    "full": Profile(
        MODELS,
        {
            "multi-turn": Chats(),
            "shared-prefixes": SharedPrefixes(),
            "documents": Documents(),
            "shift": shift(),
            "reasoning": reasoning(),
            "agents": agents(),
            "exams": Exams(),
            "tenants": Tenants(),
            "bursts": Bursts(),
            "rag": Passages(),
            "agentic": CodingAgents(),
            "mmmu": Pictures(),
            "mmmu-in-order": Pictures(mixed=False),
        },
        ("stock", "stock-best", "max-page", "unified", "jenga"),
        Limits(),
        lambda path: Mooncake(path, 200, one_in=20, faster=100, longest=100_000),
    ),
}
