"""A debug mode: do a rank's peers hand out, and evict, the same pages as it? Not for serving.

SGLANG_JENGA_COMPARE_RANKS=1    after every round of scheduling
SGLANG_JENGA_COMPARE_RANKS=50   after every 50th

Each rank keeps a checksum of all small ids that it has handed out, and of all that it has evicted,
in their order. The ranks compare them before the step that the round has chosen runs, and the
server ends where they differ. At idle each rank logs its own, a rank without peers too. The stages
of a pipeline do not compare theirs, only log them: none of them waits for another in a round.
"""

from __future__ import annotations

import logging
import os
import zlib
from typing import Any

import numpy as np

from sglang_jenga.pages.allocator import Allocator, Order
from sglang_jenga.pages.extent import Extent
from sglang_jenga.plan.spec import PoolPlan
from sglang_jenga.serving.ranks import Peers, differences, peers_in_step

ENV = "SGLANG_JENGA_COMPARE_RANKS"

logger = logging.getLogger(__name__)


class RanksDiffer(RuntimeError):
    """Two ranks have handed out or evicted different pages; the message says which and what."""


def rounds_from_environment() -> int:
    """Compare after every so many rounds; 0 for never.

    Raises:
        ValueError: the variable is no such number.
    """
    text = os.environ.get(ENV, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"{ENV}: a number of rounds is needed, 0 for never, got {text!r}")
    return int(text or 0)


class Sum:
    """How often something happened, and a checksum of the small ids in it."""

    def __init__(self) -> None:
        self.times, self.crc = 0, 0

    def add(self, group_id: int, ids: np.ndarray) -> None:
        self.crc = zlib.crc32(ids.tobytes(), zlib.crc32(b"%d:" % group_id, self.crc))

    def __str__(self) -> str:
        return f"{self.times} with checksum {self.crc:08x}"


class TracedAllocator(Allocator):
    """An `Allocator` that remembers what it has handed out and evicted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allocations, self.evictions = Sum(), Sum()

    def alloc(self, *args: Any, **kwargs: Any) -> list[np.ndarray] | None:
        found = super().alloc(*args, **kwargs)
        if found is not None:
            self.allocations.times += 1
            for group_id, ids in enumerate(found):
                self.allocations.add(group_id, ids)
        return found

    def evict(self, extent: Extent) -> None:
        group_id, ids = extent.group_id, extent.ids
        super().evict(extent)
        self.evictions.times += 1
        self.evictions.add(group_id, ids)

    def findings(self) -> dict[str, str]:
        return {"allocations": str(self.allocations), "evictions": str(self.evictions)}


class RankTrace:
    """What this rank's allocator has done so far, held against what its peers' have."""

    def __init__(self, core: TracedAllocator, peers: Peers | None, every: int) -> None:
        self._core, self._peers, self._every = core, peers, every
        self._rounds = 0
        self._logged = core.findings()

    def note_round(self, *, idle: bool) -> None:
        """A round of scheduling ends; all ranks go through the same rounds.

        Raises:
            RanksDiffer: on every rank.
        """
        self._rounds += 1
        if self._peers is not None and self._rounds % self._every == 0:
            difference = differences(self._peers.everybody(self._core.findings()))
            if difference:
                raise RanksDiffer(
                    f"ranks with the same requests differ in round {self._rounds} in {difference}"
                )
        if idle:
            self._log()

    def _log(self) -> None:
        found = self._core.findings()
        if found != self._logged:
            self._logged = found
            logger.info(
                "jenga rank trace: %s", ", ".join(f"{name} {said}" for name, said in found.items())
            )


def trace_of(core: Allocator) -> RankTrace | None:
    """What compares this rank's pages with its peers'; None unless it was asked for."""
    if not isinstance(core, TracedAllocator):
        return None
    return RankTrace(core, peers_in_step(), rounds_from_environment())


def build_core(plan: PoolPlan, order: Order) -> Allocator:
    """The pool's allocator, traced if that was asked for."""
    return (TracedAllocator if rounds_from_environment() else Allocator)(plan, order=order)
