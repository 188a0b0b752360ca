"""Which requests are tracked, that is, leave a state where another one may go on.

A state costs the bytes of many tokens: 3,144 tokens of KV in Qwen3-Next, 3,093 in Falcon-H1. While
a request is tracked it holds one more of them, which another request could run in. While nobody
waits for memory there is no such other one, and everybody is tracked.
"""

from __future__ import annotations

from typing import Any

from sglang_jenga.plan.spec import PoolPlan
from sglang_jenga.serving import ablation

SHARE = 4
"""A state is worth its bytes if it saves a SHARE-th of the tokens whose KV they would hold."""

MOST = 1024
"""Tokens that are worth a state however little KV they have: there they cost computing alone."""


def least_worth(plan: PoolPlan) -> int:
    """Tokens that a tracked state has to save whoever hits it; 0 where that part is off."""
    if not ablation.from_environment().worth_tracking:
        return 0
    return min(plan.state_cost_tokens // SHARE, MOST)


class Tracking:
    """SGLang's lazy tracking, but for requests whose states would save next to nothing.

    ``least``: tokens that a state has to save; 0 to track everybody, as SGLang does. ``slots``:
    tracking slots of a request that begins tracked. ``sparing``: whether somebody waits for memory.
    """

    sparing = False

    def __init__(self, least: int, slots: int) -> None:
        self.least, self._slots = least, slots

    @property
    def _least_now(self) -> int:
        return self.least if self.sparing else 0

    def slots_of(self, req: Any) -> int:
        """Tracking slots that a request begins with. A short prompt has none, unless it parts from
        cached ones: the place where requests part is where the next ones part as well."""
        if req.mamba_branching_seqlen is not None:
            return self._slots
        new = len(req.full_untruncated_fill_ids) - req.prefix_len
        return self._slots if new >= self._least_now else 0

    def takes_slot(self, req: Any, length: int) -> bool:
        """Whether a decode step takes a slot for a request that comes to a track boundary of
        ``length`` tokens. One that is tracked needs the second slot while the step runs."""
        empty = req.kv.mamba_ping_pong_empty
        if not all(empty):
            return any(empty)
        return length - req.kv.cache_protected_len >= self._least_now
