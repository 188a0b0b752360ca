"""A rank's peers: those that get the same requests, tell each other nothing, and must decide alike.

Each rank of a tensor parallel group has a scheduler, trees and an allocator of its own, gets the
same requests, and hands out the same pages because it does the same arithmetic. So do the stages of
a pipeline. With DP attention the ranks are divided in groups, each with requests of its own: only
the ranks of one such group have to agree. What they find out about each other is compared here.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

Findings = Mapping[str, Hashable]
"""What one rank says of itself, by what it is called in a line for the user."""


class Peers:
    """The ranks with the same requests, this one among them, by their numbers among all ranks."""

    def __init__(self, *groups: Any) -> None:
        """``groups``: SGLang's ``GroupCoordinator``s, ranks of one stage, then the stages. What is
        compared travels over their CPU groups."""
        self._groups = [group for group in groups if len(group.ranks) > 1]

    def everybody(self, mine: Any) -> dict[int, Any]:
        """What each rank has sent, by rank; all of them have to ask at the same moment."""
        from torch.distributed import all_gather_object, get_rank

        everybody = {get_rank(): mine}
        for group in self._groups:  # each tells what it has heard from those of the group before
            found: list[Any] = [None] * len(group.ranks)
            all_gather_object(found, everybody, group=group.cpu_group)
            everybody = {rank: said for heard in found for rank, said in heard.items()}
        return dict(sorted(everybody.items()))


def peers_of_rank() -> Peers | None:
    """The ranks that must hand out the same pages as this one; None if it is alone."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.attn_tp_size * parallel.pp_size == 1:
        return None
    return Peers(parallel.attn_tp_group, parallel.pp_group)


def peers_in_step() -> Peers | None:
    """Those of them that can be asked in any round: the stages of a pipeline are rounds apart, and
    the first would wait for a later one that waits for it."""
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
