"""SGLang's environment variables whose only reader is a part that jenga replaces.

Refused where the user asked for an effect that a jenga server does not have, one warning line where
the variable only tunes the replaced code. Only variables that are set are looked at: what SGLang
sets for itself while it resolves a model comes later.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang_jenga.plan.request_need import MOST_BEHIND_WINDOW


class EnvironmentRule(NamedTuple):
    """A variable and the values with which a jenga server does what it says.

    ``refused``: the server does not start; otherwise it warns.
    """

    name: str
    served: Callable[[Any], bool]
    why: str
    refused: bool = True

    def line(self, name: str, value: str) -> str:
        """What and why, for a variable that is set under this name; how out, if refused."""
        if self.refused:
            return (
                f"--memory-backend jenga does not work with {name}={value}: {self.why}; "
                f"unset {name} or drop --memory-backend"
            )
        return f"--memory-backend jenga ignores {name}={value}: {self.why}"


def _off(value: Any) -> bool:
    return not value


def _on(value: Any) -> bool:
    return bool(value)


_CHECKS = (
    "its checks are in code that jenga replaces (SGLANG_CHECK_KV_PAGE_INVARIANTS=1 with "
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY=1 checks jenga's)"
)
ENVIRONMENT_RULES = (
    EnvironmentRule(
        "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", _off, "a jenga buffer has one size for life"
    ),
    EnvironmentRule("SGLANG_USE_HND_KVCACHE", _off, "jenga brings its own layout"),
    EnvironmentRule(
        "SGLANG_AITER_KV_CACHE_LAYOUT", lambda value: value == "nhd", "jenga brings its own layout"
    ),
    EnvironmentRule(
        "SGLANG_MOONCAKE_CUSTOM_MEM_POOL",
        lambda value: value is None,
        "the one buffer comes from torch's own allocator",
    ),
    EnvironmentRule(
        "SGLANG_PP_COMM_OVERLAP",
        _off,
        "a stage would change the map of windows while a step reads it",
    ),
    EnvironmentRule(
        "SGLANG_DISAGG_STAGING_BUFFER", _off, "it gathers heads out of layers that lie apart"
    ),
    EnvironmentRule("SGLANG_DEBUG_MEMORY_POOL", _off, _CHECKS),
    EnvironmentRule("SGLANG_MAMBA_DEBUG_ASSERTS", lambda value: value != "1", _CHECKS),
    EnvironmentRule(
        "SGLANG_SWA_EVICTION_INTERVAL",
        lambda value: value <= MOST_BEHIND_WINDOW,
        f"windows give back what lies behind them every {MOST_BEHIND_WINDOW} tokens at the latest",
        refused=False,
    ),
    EnvironmentRule(
        "SGLANG_VLM_CACHE_SIZE_MB",
        _off,
        "what a vision tower makes of images lies in idle pages of the pool, where nothing is set "
        "aside for it and nothing but the pool bounds it; 0 turns that off",
        refused=False,
    ),
    EnvironmentRule(
        "SGLANG_OPT_MAMBA_SKIP_DECODE_LOCK",
        _off,
        "a running request never locks the cached state that it began with",
        refused=False,
    ),
    EnvironmentRule(
        "SGLANG_OPT_UNIFIED_CACHE_FREE_OUT_OF_WINDOW_SLOTS",
        _on,
        "what lies behind a window is kept until memory is short, and then freed",
        refused=False,
    ),
    EnvironmentRule(
        "SGLANG_OPT_RELEASE_PREFILL_SWA",
        _off,
        "a window always unlocks the part of the prefix that it has left behind",
        refused=False,
    ),
    EnvironmentRule(
        "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND",
        lambda value: value == "rust",
        "jenga brings its own radix trees",
        refused=False,
    ),
    EnvironmentRule(
        "SGLANG_DISABLE_FUSED_MAMBA_SLOT_OPS",
        _off,
        "a whole state is one row of the buffer, cleared and copied at once",
        refused=False,
    ),
)


def broken_lines() -> tuple[list[str], list[str]]:
    """Lines of refusal and lines of warning about this process's environment."""
    refused: list[str] = []
    warned: list[str] = []
    for rule in ENVIRONMENT_RULES:
        name, value = _given(rule.name)
        if name in os.environ and not rule.served(value):
            lines = refused if rule.refused else warned
            lines.append(rule.line(name, os.environ[name]))
    return refused, warned


def _given(name: str) -> tuple[str, Any]:
    """The name that the variable is set by, which may be an older one, and its value as SGLang
    reads it: parsed where SGLang declares the variable."""
    from sglang.srt.environ import envs

    declared = getattr(envs, name, None)
    if declared is None:
        return name, os.environ.get(name)
    older = getattr(declared, "deprecated_name", name)
    return (name if declared.is_set() else older), declared.get()
