"""A rank's peers: those that get the same requests, tell each other nothing, and must decide alike.

Each rank of a tensor parallel group has a scheduler, trees and an allocator of its own, gets the
same requests, and hands out the same pages because it does the same arithmetic. With DP attention
the ranks are divided in groups, each with requests of its own: only the ranks of one such group
have to agree. What they find out about each other is compared here.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

Findings = Mapping[str, Hashable]
"""What one rank says of itself, by what it is called in a line for the user."""


class Peers:
    """The ranks with the same requests, this one among them, numbered as in SGLang's log."""

    def __init__(self, group: Any) -> None:
        """``group``: SGLang's ``GroupCoordinator``. What is compared travels over its CPU group."""
        self._group = group.cpu_group
        self.ranks: list[int] = list(group.ranks)

    def everybody(self, mine: Any) -> dict[int, Any]:
        """What each rank has sent, by rank; all of them have to ask at the same moment."""
        from torch.distributed import all_gather_object

        found: list[Any] = [None] * len(self.ranks)
        all_gather_object(found, mine, group=self._group)
        return dict(zip(self.ranks, found, strict=True))


def peers_of_rank() -> Peers | None:
    """The ranks that must hand out the same pages as this one; None if it is alone."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return Peers(parallel.attn_tp_group) if parallel.attn_tp_size > 1 else None


def differences(findings: Mapping[int, Findings]) -> str:
    """What the ranks differ in, who says what: ``"page size (16 on rank 0; 1 on ranks 1, 2)"``.
    Empty if they agree."""
    names = dict.fromkeys(name for found in findings.values() for name in found)
    parts = []
    for name in names:
        said: dict[Hashable, list[int]] = {}
        for rank, found in findings.items():
            said.setdefault(found.get(name, "nothing"), []).append(rank)
        if len(said) > 1:
            each = "; ".join(f"{value} on {_named(ranks)}" for value, ranks in said.items())
            parts.append(f"{name} ({each})")
    return ", ".join(parts)


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
